"""Linear maps along one dimension whose outputs read a few inputs each: interpolation and pooling, and their transposes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

# Up to this many entries the transpose is a product with the dense matrix: XLA runs scatters slowly, products fast.
_DENSE = 1 << 20
_UNROLL = 8


class Taps(NamedTuple):
    """Output o reads ``sum(weight[o, t] * x[index[o, t]])``; entries that are not `valid` are skipped (None: all count)."""

    index: np.ndarray
    weight: np.ndarray | None = None
    valid: np.ndarray | None = None


def _along(values, axis: int, rank: int):
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def repeats(index: np.ndarray, n: int) -> int:
    """How many times each of n inputs is repeated in a row, or 0 where `index` is no such pattern."""
    count, rest = divmod(len(index), n) if n else (0, 1)
    return count if rest == 0 and count and (index == np.arange(len(index)) // count).all() else 0


def resample(x, axis: int, taps: Taps):
    """Apply `taps` along `axis`."""
    n, index = x.shape[axis], taps.index
    if taps.weight is None:
        count = repeats(index[:, 0], n)
        if count == 1:
            return x
        return jnp.repeat(x, count, axis) if count else jnp.take(x, jnp.asarray(index[:, 0]), axis)
    weight = taps.weight.astype(x.dtype)
    if index.shape[1] > _UNROLL:
        picked = jnp.take(x, jnp.asarray(index), axis)  # [..., out, T, ...]
        shape = [*[1] * axis, *index.shape, *[1] * (x.ndim - axis - 1)]
        picked = picked * jnp.asarray(weight).reshape(shape)
        if taps.valid is not None:
            picked = jnp.where(jnp.asarray(taps.valid).reshape(shape), picked, 0)
        return picked.sum(axis + 1)
    total: Any = None
    for t in range(index.shape[1]):
        part = jnp.take(x, jnp.asarray(index[:, t]), axis) * _along(jnp.asarray(weight[:, t]), axis, x.ndim)
        if taps.valid is not None and not taps.valid[:, t].all():
            part = jnp.where(_along(jnp.asarray(taps.valid[:, t]), axis, x.ndim), part, 0)
        total = part if total is None else total + part
    return total


def resample_transpose(grad, axis: int, taps: Taps, n: int):
    """Transpose of `resample` for an input of n elements along `axis`."""
    out = grad.shape[axis]
    if taps.weight is None:
        count = repeats(taps.index[:, 0], n)
        if count == 1:
            return grad
        if count:
            return grad.reshape(*grad.shape[:axis], n, count, *grad.shape[axis + 1 :]).sum(axis + 1)
    weight = np.ones(taps.index.shape) if taps.weight is None else taps.weight
    if taps.valid is not None:
        weight = np.where(taps.valid, weight, 0)
    moved = jnp.moveaxis(grad, axis, -1)
    if n * out <= _DENSE:
        matrix = np.zeros((out, n))
        np.add.at(matrix, (np.arange(out)[:, None], taps.index), weight)
        found = jnp.matmul(moved, jnp.asarray(matrix.astype(grad.dtype)), precision=lax.Precision.HIGHEST)
    else:
        found = jnp.zeros((*moved.shape[:-1], n), grad.dtype)
        for t in range(taps.index.shape[1]):
            found = found.at[..., taps.index[:, t]].add(moved * jnp.asarray(weight[:, t].astype(grad.dtype)))
    return jnp.moveaxis(found, -1, axis)
