"""Where payloads lie when they lie on several devices.

A storage may be pinned to a sharding (`Storage.sharding`): whatever is written into it is laid out that way, and copies
that follow it (``zeros_like``, ``clone``, deep copies) are pinned, too. Every other payload lies where XLA puts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np


def place(value: Any, sharding: Any) -> Any:
    """`value` (an array of NumPy's or JAX's) laid out as the `jax.sharding.Sharding` says; itself where it is already.

    With several processes, what each of them holds alone must be the same everywhere.
    """
    if isinstance(value, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(value, sharding)
    with jax.enable_x64(True):
        if isinstance(value, jax.Array):
            if value.sharding == sharding or value.sharding.is_equivalent_to(sharding, value.ndim):
                return value
            if not value.is_fully_addressable:
                return relayout(sharding)(value)
            if not sharding.is_fully_addressable:
                value = np.asarray(value)
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


class _Pins:
    """Counts how often storages were pinned, so that compiled programs notice; and how the batch was divided last."""

    epoch = 0
    parts = 1


pins = _Pins()


def divided() -> bool:
    """Whether XLA may have to divide what is computed now over devices: a tensor was laid out over several in this process.

    Not in code for each device (`shard_map`).
    """
    return pins.epoch > 0 and not jax.sharding.get_abstract_mesh().manual_axes


_batch_axes: dict[tuple[str, ...], tuple[str, ...]] = {}


def divide_batch(mesh: Any, axes: tuple[str, ...]) -> None:
    """Say which axes of meshes that are named as `mesh` divide the batch: the division of kernels goes by it."""
    _batch_axes[tuple(mesh.axis_names)] = tuple(axes)
    pins.parts = math.prod(mesh.shape[axis] for axis in axes)


def batch_axes(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Which of the mesh axes `names` divide the batch; None if nothing has said so."""
    return _batch_axes.get(names)


def batch_parts() -> int:
    """Over how many devices the batch is divided, as far as was said; 1 in code for each device."""
    return pins.parts if divided() else 1


_relayouts: dict[Any, Callable[[Any], Any]] = {}


def relayout(sharding: Any) -> Callable[[Any], Any]:
    """A compiled identity whose result is laid out as `sharding` says: all processes call it together."""
    known = _relayouts.get(sharding)
    if known is None:
        known = _relayouts[sharding] = jax.jit(lambda x: x, out_shardings=sharding)
    return known


_placed: dict[Any, Any] = {}


def placed_program(program: Any, shape: tuple[int, ...], sharding: Any) -> Callable[..., Any]:
    """The compiled form of a `Program` whose results of `shape` are made where `sharding` says, never whole elsewhere."""
    known = _placed.get((program, shape, sharding))
    if known is None:

        def run(*operands: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.lax.with_sharding_constraint(x, sharding) if x.shape == shape else x,
                program.fn(*operands),
            )

        known = _placed[program, shape, sharding] = jax.jit(run)
    return known
