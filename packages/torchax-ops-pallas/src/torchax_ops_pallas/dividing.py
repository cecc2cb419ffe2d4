"""Kernels in programs that XLA divides over devices: each device runs the kernel on its batches and heads.

XLA cannot look into a kernel, and the TPU compiler does not call back as `jax.experimental.custom_partitioning` needs it. So
the call is a primitive of its own, which becomes a `shard_map` when the program is lowered: there the devices are known,
nothing of them when it is traced. On one device, and inside of `shard_map`, it is the kernel itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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


def over_batch_and_heads(
    body: Body, inputs: Sequence[str], outputs: Sequence[str], *operands: jax.Array
) -> tuple[jax.Array, ...]:
    """``body(*operands)``, divided in programs for several devices, and folded into the batch by `jax.vmap`.

    Args:
        body: the kernel of however many batches and heads its operands have; traced in 32-bit mode.
        inputs: a letter for each dimension of each operand: ``b`` batch (always the first), ``h`` query heads, ``g`` key heads,
            ``1`` of size one and broadcast, any other letter for what must be whole on a device.
        outputs: the same of the results.
        operands: arrays.

    Returns:
        The results of `body`.
    """

    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> tuple[jax.Array, ...]:
        closed = jax.make_jaxpr(lambda *x: tuple(body(*x)))(*operands)
        return tuple(_kernel.bind(*operands, body=body, closed=closed, inputs=tuple(inputs), outputs=tuple(outputs)))

    @call.def_vmap
    def _(n: int, batched: Sequence[bool], *operands: jax.Array) -> Any:
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

    return call(*operands)


def _abstract(*operands: Any, closed: Any, **_: Any) -> Any:
    return closed.out_avals


def _lower(ctx: Any, *operands: Any, body: Body, closed: Any, inputs: Any, outputs: Any) -> Any:
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
    sizes = {d: n for x, dims in zip(ctx.avals_in, inputs, strict=True) for d, n in zip(dims, x.shape, strict=True)}
    axes = divide(mesh, sizes["b"], sizes["h"], sizes["g"])

    def specs(names: Sequence[str]) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(*(axes.get(d) for d in dims)) for dims in names)

    def each(*given: jax.Array) -> tuple[jax.Array, ...]:
        return _each(body, inputs, outputs, sizes, axes, mesh, given)

    divided = jax.shard_map(each, mesh=mesh, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False)
    with jax.enable_x64(False):
        return mlir.lower_fun(divided, multiple_results=True)(ctx, *operands)


def _run(*operands: jax.Array, **params: Any) -> Any:
    if all(len(x.sharding.device_set) == 1 for x in operands):
        return jaxpr_as_fun(params["closed"])(*operands)
    return dispatch.apply_primitive(_kernel, *operands, **params)


_kernel = Primitive("kernel_over_batch_and_heads")
_kernel.multiple_results = True
_kernel.def_abstract_eval(_abstract)
_kernel.def_impl(_run)
mlir.register_lowering(_kernel, _lower)
dispatch.prim_requires_devices_during_lowering.add(_kernel)


def divide(mesh: Any, batch: int, heads: int, key_heads: int) -> dict[str, tuple[str, ...]]:
    """The mesh axes of batch, query heads and key heads, as letters of `over_batch_and_heads`.

    Those that are known to divide the batch do so; of an unknown mesh of several axes, all but the last. The others divide the
    heads. An axis that does not fit is left out: what it would divide is then on each of its devices.
    """

    def fitting(axes: Sequence[str], size: int, fits: Callable[[int], bool] = lambda n: True) -> tuple[str, ...]:
        chosen: tuple[str, ...] = ()
        for axis in axes:
            n = math.prod(mesh.shape[a] for a in (*chosen, axis))
            if mesh.shape[axis] > 1 and size % n == 0 and fits(n):
                chosen = (*chosen, axis)
        return chosen

    names = tuple(mesh.axis_names)
    known = batch_axes(names)
    of_batch = fitting(names[: max(1, len(names) - 1)] if known is None else known, batch)
    rest = [a for a in names if a not in of_batch and a not in (known or ())]
    group = heads // key_heads
    of_heads = fitting(rest, heads, lambda n: key_heads % n == 0 or group % (heads // n) == 0)
    each_has_own = key_heads % math.prod(mesh.shape[a] for a in of_heads) == 0
    return {"b": of_batch, "h": of_heads, "g": of_heads if each_has_own else ()}


def _each(
    body: Body, inputs: Any, outputs: Any, sizes: dict[str, int], axes: Any, mesh: Any, operands: Any
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
