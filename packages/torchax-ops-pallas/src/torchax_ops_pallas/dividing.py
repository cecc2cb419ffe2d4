"""Kernels in programs that XLA divides over devices: each device runs the kernel on its part of the operands.

XLA cannot look into a kernel, and the TPU compiler does not call back as `jax.experimental.custom_partitioning` needs it. So
the call is a primitive of its own, which becomes a `shard_map` when the program is lowered: there the devices are known,
nothing of them when it is traced. On one device, and inside of `shard_map`, it is the kernel itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import dispatch  # the set of primitives that want the devices when they are lowered is nowhere else
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import Mesh, PartitionSpec
from torchax.ops import batch_axes

Body = Callable[..., Sequence[jax.Array]]
Axes = dict[str, tuple[str, ...]]


class Division(NamedTuple):
    """How a call is divided.

    Attributes:
        inputs: a letter for each dimension of each operand.
        outputs: the same of the results.
        choose: the mesh axes that divide the dimensions of a letter, by letter, of a mesh and the sizes by letter.
        each: the results of one device, of its operands, the axes, and the sizes by letter of all devices.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    choose: Callable[[Any, dict[str, int]], Axes]
    each: Callable[[Sequence[jax.Array], Any, Axes, dict[str, int]], Sequence[jax.Array]]


def over_devices(body: Body, division: Division, *operands: jax.Array, fold: Any = None) -> tuple[jax.Array, ...]:
    """``body(*operands)``, divided in programs for several devices.

    Args:
        body: the kernel; traced in 32-bit mode.
        division: what each device does.
        operands: arrays.
        fold: the rule of `jax.vmap`, as `jax.custom_batching.custom_vmap` wants it; None for one call after another.

    Returns:
        The results of `body`.
    """

    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> tuple[jax.Array, ...]:
        closed = jax.make_jaxpr(lambda *x: tuple(body(*x)))(*operands)
        return tuple(_kernel.bind(*operands, closed=closed, division=division))

    def one_after_another(_n: int, batched: Sequence[bool], *operands: jax.Array) -> Any:
        def one(chosen: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
            given = iter(chosen)
            return call(*(next(given) if known else x for x, known in zip(operands, batched, strict=True)))

        found = lax.map(one, [x for x, known in zip(operands, batched, strict=True) if known])
        return found, (True,) * len(found)

    call.def_vmap(fold or one_after_another)
    return call(*operands)


def _abstract(*operands: Any, closed: Any, **_: Any) -> Any:
    return closed.out_avals


def _lower(ctx: Any, *operands: Any, closed: Any, division: Division) -> Any:
    context = ctx.module_context.axis_context
    devices = getattr(context, "device_assignment", None)
    if not devices or len(devices) == 1:  # one device, or code for each
        return mlir.lower_fun(jaxpr_as_fun(closed), multiple_results=True)(ctx, *operands)
    known = context.abstract_mesh
    mesh = (
        Mesh(np.array(devices), ("all",))
        if known is None or known.empty
        else Mesh(np.array(devices).reshape(known.axis_sizes), known.axis_names, axis_types=known.axis_types)
    )
    sizes = {
        d: n for x, dims in zip(ctx.avals_in, division.inputs, strict=True) for d, n in zip(dims, x.shape, strict=True)
    }
    axes = division.choose(mesh, sizes)

    def specs(names: Sequence[str]) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(*(axes.get(d) for d in dims)) for dims in names)

    def each(*given: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(division.each(given, mesh, axes, sizes))

    divided = jax.shard_map(
        each, mesh=mesh, in_specs=specs(division.inputs), out_specs=specs(division.outputs), check_vma=False
    )
    with jax.enable_x64(False):
        return mlir.lower_fun(divided, multiple_results=True)(ctx, *operands)


def _run(*operands: jax.Array, **params: Any) -> Any:
    if all(len(x.sharding.device_set) == 1 for x in operands if isinstance(x, jax.Array)):
        return jaxpr_as_fun(params["closed"])(*operands)
    return dispatch.apply_primitive(_kernel, *operands, **params)


_kernel = Primitive("kernel_over_devices")
_kernel.multiple_results = True
_kernel.def_abstract_eval(_abstract)
_kernel.def_impl(_run)
mlir.register_lowering(_kernel, _lower)
dispatch.prim_requires_devices_during_lowering.add(_kernel)


def fitting(mesh: Any, axes: Sequence[str], size: int, fits: Callable[[int], bool] = lambda n: True) -> tuple[str, ...]:
    """Those of `axes` that, one after the other, divide `size` evenly."""
    chosen: tuple[str, ...] = ()
    for axis in axes:
        n = math.prod(mesh.shape[a] for a in (*chosen, axis))
        if mesh.shape[axis] > 1 and size % n == 0 and fits(n):
            chosen = (*chosen, axis)
    return chosen


def for_batch(mesh: Any, size: int, nothing_else: bool = False) -> tuple[tuple[str, ...], list[str]]:
    """The mesh axes that divide a batch of `size`, and those for anything else.

    Those that are known to divide the batch do so, if they can, and nothing else. Of an unknown mesh, all axes but the last divide the batch,
    or the only one; those that cannot are free. With `nothing_else` they are as if known, and an only one is free.
    """
    names = tuple(mesh.axis_names)
    known = batch_axes(names)
    if known is None and nothing_else:
        known = names[:-1]
    chosen = fitting(mesh, names[: max(1, len(names) - 1)] if known is None else known, size)
    return chosen, [a for a in names if a not in chosen and a not in (known or ())]


def over_batch_and_heads(
    body: Body,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *operands: jax.Array,
    heads_fit: Callable[[int], bool] = lambda n: True,
) -> tuple[jax.Array, ...]:
    """``body(*operands)``, divided in programs for several devices, and folded into the batch by `jax.vmap` where that is the first dimension.

    Args:
        body: the kernel of however many batches and heads its operands have; traced in 32-bit mode.
        inputs: a letter for each dimension of each operand: ``b`` batch, ``h`` query heads, ``g`` key heads, ``p`` keys and values of
            each key head by turns, ``1`` of size one and broadcast, any other letter for what must be whole on a device. Key heads in an
            operand without a batch are a cache that all of it shares: a device has those of its heads, or all.
        outputs: the same of the results.
        operands: arrays.
        heads_fit: whether a device may have so many key heads of a cache.

    Returns:
        The results of `body`.
    """
    cache = any(set("gp") & set(dims) and "b" not in dims for dims in inputs)

    def choose(mesh: Any, sizes: dict[str, int]) -> Axes:
        key_heads = sizes["g"] if "g" in sizes else sizes["p"] // 2
        return divide(mesh, sizes.get("b", 1), sizes["h"], key_heads, heads_fit if cache else None)

    def each(parts: Sequence[jax.Array], mesh: Any, axes: Axes, sizes: dict[str, int]) -> Sequence[jax.Array]:
        return _each(body, inputs, outputs, sizes, axes, mesh, parts)

    def fold(n: int, batched: Sequence[bool], *operands: jax.Array) -> Any:
        batch = next(
            x.shape[d.index("b") + known] for x, d, known in zip(operands, inputs, batched, strict=True) if "b" in d
        )
        folded, named = [], []
        for x, dims, known in zip(operands, inputs, batched, strict=True):
            if known or dims[0] == "b":
                x = x if known else jnp.broadcast_to(x, (n, *x.shape))
                x = jnp.broadcast_to(x, (n, batch, *x.shape[2:])).reshape(n * batch, *x.shape[2:])
                dims = "b" + dims[1:]
            folded.append(x)
            named.append(dims)
        found = over_batch_and_heads(body, named, outputs, *folded)
        return tuple(x.reshape(n, batch, *x.shape[1:]) for x in found), (True,) * len(outputs)

    division = Division(tuple(inputs), tuple(outputs), choose, each)
    return over_devices(body, division, *operands, fold=None if cache else fold)


def divide(mesh: Any, batch: int, heads: int, key_heads: int, of_cache: Callable[[int], bool] | None = None) -> Axes:
    """The mesh axes of batch, query heads and key heads, as letters of `over_batch_and_heads`.

    The batch takes its axes (`for_batch`), the others divide the heads. An axis that does not fit is left out: what it would divide
    is then on each of its devices. Of a cache, which must not be moved, `of_cache` says which numbers of key heads a device may have.
    """
    of_batch, rest = for_batch(mesh, batch, nothing_else=of_cache is not None)
    group = heads // key_heads

    def own(n: int) -> bool:
        return key_heads % n == 0

    def fits(n: int) -> bool:
        if of_cache is not None:
            return own(n) and of_cache(key_heads // n)
        return own(n) or group % (heads // n) == 0

    of_heads = fitting(mesh, rest, heads, fits)
    of_key_heads = of_heads if own(math.prod(mesh.shape[a] for a in of_heads)) else ()
    return {"b": of_batch, "h": of_heads, "g": of_key_heads, "p": of_key_heads}


def _each(
    body: Body, inputs: Any, outputs: Any, sizes: dict[str, int], axes: Axes, mesh: Any, operands: Any
) -> tuple[jax.Array, ...]:
    """The part of one device."""
    if axes["g"] == axes["h"]:
        return tuple(body(*operands))
    n, group = math.prod(mesh.shape[a] for a in axes["h"]), sizes["h"] // sizes["g"]
    first = lax.axis_index(axes["h"]) * (sizes["h"] // n) // group
    chosen = [
        lax.dynamic_slice_in_dim(x, first, 1, dims.index("g")) if "g" in dims else x
        for x, dims in zip(operands, inputs, strict=True)
    ]
    results = []
    for x, dims in zip(body(*chosen), outputs, strict=True):
        if "g" in dims:
            place = dims.index("g")
            whole = jnp.zeros((*x.shape[:place], sizes["g"], *x.shape[place + 1 :]), x.dtype)
            x = lax.psum(lax.dynamic_update_slice_in_dim(whole, x, first, place), axes["h"])
        results.append(x)
    return tuple(results)
