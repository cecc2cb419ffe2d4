"""Products of groups of rows in programs that XLA divides over devices: each device has some of the rows, groups or columns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .dividing import Axes, Division, fitting, for_batch, over_devices


def over_groups(
    product: Callable[..., jax.Array], inputs: tuple[str, str], output: str, a: jax.Array, b: jax.Array, ends: jax.Array
) -> jax.Array:
    """``product(a, b, ends)``, divided in programs for several devices.

    Args:
        product: of however many rows, groups and columns its operands have; zeros for rows and groups that nothing is said of.
        inputs: a letter for each dimension of `a` and `b`: ``r`` rows, ``g`` groups, ``n`` columns, any other letter for what must be whole on a
            device. Each product of a layer and of its gradients uses the letters alike, so that they are divided alike.
        output: the same of the result.
        a: has the rows as its first dimension.
        b: has the rows or the groups as its first dimension.
        ends: ``[groups]``, integers that do not decrease: where groups end.

    Returns:
        The result of `product`.
    """
    letters = (*inputs, "e")
    each = functools.partial(_each, product, letters, output)
    with jax.enable_x64(False):
        operands = a, b, ends.astype(jnp.int32)
        return over_devices(lambda *x: (product(*x),), Division(letters, (output,), _choose, each), *operands)[0]


def _choose(mesh: Any, sizes: dict[str, int]) -> Axes:
    """The batch's axes divide the rows, the others the groups, and what does not divide these the columns."""
    of_rows, rest = for_batch(mesh, sizes["r"])
    of_groups = fitting(mesh, rest, sizes["e"])
    of_columns = fitting(mesh, [axis for axis in rest if axis not in of_groups], sizes["n"])
    return {"r": of_rows, "g": of_groups, "n": of_columns}


def _each(
    product: Any,
    inputs: tuple[str, ...],
    output: str,
    parts: Sequence[jax.Array],
    mesh: Any,
    axes: Axes,
    sizes: dict[str, int],
) -> tuple[jax.Array]:
    """The product of one device: of the rows that it has, those of its groups are moved to the front."""
    *operands, ends = parts
    if axes["r"]:
        rows = operands[0].shape[0]
        ends = jnp.clip(ends - lax.axis_index(axes["r"]) * rows, 0, rows)
    before = jnp.int32(0)
    if axes["g"]:
        groups = sizes["e"] // math.prod(mesh.shape[axis] for axis in axes["g"])
        first = lax.axis_index(axes["g"]) * groups
        before = jnp.where(first > 0, ends[jnp.maximum(first - 1, 0)], 0)
        ends = lax.dynamic_slice_in_dim(ends, first, groups) - before
        operands = [jnp.roll(x, -before, 0) if dims[0] == "r" else x for x, dims in zip(operands, inputs, strict=False)]
    out = product(*operands, ends)
    if axes["g"] and output[0] == "r":
        out = jnp.roll(out, before, 0)
    summed = tuple(axis for letter, of in axes.items() if letter not in output for axis in of)
    return (lax.psum(out, summed) if summed else out,)
