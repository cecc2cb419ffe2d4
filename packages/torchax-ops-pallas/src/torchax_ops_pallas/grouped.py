"""Products of consecutive groups of rows with a matrix for each, as mixtures of experts have them.

Forward is XLA's own kernel of `jax.lax.ragged_dot`. Backward is JAX's megablox: XLA multiplies every row by every group for the
gradient of the matrices, and copies all matrices transposed for the gradient of the rows. Everything is traced in 32-bit mode:
index arithmetic of kernels fails in the 64-bit one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from .blocks import LANES, product_tiles, round_up
from .dividing_groups import over_groups


@contextlib.contextmanager
def _traced(x: jax.Array) -> Iterator[None]:
    """In 32-bit mode; kernels know no precision above the default one for bfloat16, whose products are exact anyway."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(False))
        if x.dtype == jnp.bfloat16:
            stack.enter_context(jax.default_matmul_precision("default"))
        yield


def _tiles(kernel: str, x: jax.Array, columns: int, groups: int) -> tuple[int, int, int]:
    """Of rows, columns of `x`, columns of the other operand; that of rows divides them, which are a multiple of `LANES`.

    A tile that holds rows of several groups is multiplied for each of them, so tiles are no longer than two groups of mean size.
    """
    tiles = product_tiles(kernel, (*x.shape, columns), x.dtype)
    most = min(tiles.rows, max(LANES, 2 * x.shape[0] // groups))
    rows = max(n for n in range(LANES, most + 1, LANES) if x.shape[0] % n == 0)
    return rows, tiles.inner, tiles.columns


def _padded(x: jax.Array) -> jax.Array:
    """`x` with rows up to a multiple of the smallest tile."""
    return jnp.pad(x, ((0, round_up(x.shape[0], LANES) - x.shape[0]), (0, 0)))


def _sizes(ends: jax.Array) -> jax.Array:
    return jnp.diff(ends.astype(jnp.int32), prepend=jnp.zeros(1, jnp.int32))


def _matmul_of_part(x: jax.Array, matrices: jax.Array, ends: jax.Array) -> jax.Array:
    with _traced(x):
        return lax.ragged_dot(x, matrices, _sizes(ends), preferred_element_type=jnp.float32).astype(x.dtype)


def _outer_of_part(x: jax.Array, y: jax.Array, ends: jax.Array, interpret: bool) -> jax.Array:
    with _traced(x):
        x, y = _padded(x), _padded(y)
        tiles = _tiles("grouped_outer", x, y.shape[1], ends.size)
        return tgmm(x.T, y, _sizes(ends), x.dtype, tiles, interpret=interpret)


def _transposed_of_part(x: jax.Array, matrices: jax.Array, ends: jax.Array, interpret: bool) -> jax.Array:
    with _traced(x):
        rows, padded = x.shape[0], _padded(x)
        tiles = _tiles("grouped_matmul", padded, matrices.shape[1], ends.size)
        out = gmm(padded, matrices, _sizes(ends), x.dtype, tiles, transpose_rhs=True, interpret=interpret)[:rows]
        inside = lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < ends[-1].astype(jnp.int32)
        return jnp.where(inside, out, jnp.zeros_like(out))  # the kernel does not write rows of no group


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x: jax.Array, matrices: jax.Array, ends: jax.Array, interpret: bool = False) -> jax.Array:
    """``x[ends[g-1]:ends[g]] @ matrices[g]`` for each group g; zeros in rows of no group.

    Args:
        x: ``[rows, K]``.
        matrices: ``[groups, K, N]``, of the dtype of `x`.
        ends: ``[groups]``, integers that do not decrease: where groups end.
        interpret: run the kernels of the backward as plain JAX operations.

    Returns:
        ``[rows, N]`` in the dtype of `x`, accumulated in float32.
    """
    return over_groups(_matmul_of_part, ("rk", "gkn"), "rn", x, matrices, ends)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_outer(x: jax.Array, y: jax.Array, ends: jax.Array, interpret: bool = False) -> jax.Array:
    """``x[ends[g-1]:ends[g]].T @ y[ends[g-1]:ends[g]]`` for each group g: how the matrices of `grouped_matmul` get gradients.

    Args:
        x: ``[rows, K]``.
        y: ``[rows, N]``, of the dtype of `x`.
        ends: ``[groups]``, integers that do not decrease: where groups end.
        interpret: run the kernel as plain JAX operations.

    Returns:
        ``[groups, K, N]`` in the dtype of `x`, accumulated in float32; zeros for empty groups.
    """
    return over_groups(functools.partial(_outer_of_part, interpret=interpret), ("rk", "rn"), "gkn", x, y, ends)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul_transposed(x: jax.Array, matrices: jax.Array, ends: jax.Array, interpret: bool) -> jax.Array:
    """`grouped_matmul` with matrices ``[groups, N, K]``, which are read where they lie."""
    body = functools.partial(_transposed_of_part, interpret=interpret)
    return over_groups(body, ("rn", "gkn"), "rk", x, matrices, ends)


def _keep(product: Any) -> Any:
    return lambda a, b, ends, interpret: (product(a, b, ends, interpret), (a, b, ends))


def _matmul_backward(interpret: bool, saved: Any, grad: jax.Array) -> Any:
    x, matrices, ends = saved
    return _matmul_transposed(grad, matrices, ends, interpret), grouped_outer(x, grad, ends, interpret), None


def _outer_backward(interpret: bool, saved: Any, grad: jax.Array) -> Any:
    x, y, ends = saved
    return _matmul_transposed(y, grad, ends, interpret), grouped_matmul(x, grad, ends, interpret), None


def _transposed_backward(interpret: bool, saved: Any, grad: jax.Array) -> Any:
    x, matrices, ends = saved
    return grouped_matmul(grad, matrices, ends, interpret), grouped_outer(grad, x, ends, interpret), None


grouped_matmul.defvjp(_keep(grouped_matmul), _matmul_backward)
grouped_outer.defvjp(_keep(grouped_outer), _outer_backward)
_matmul_transposed.defvjp(_keep(_matmul_transposed), _transposed_backward)
