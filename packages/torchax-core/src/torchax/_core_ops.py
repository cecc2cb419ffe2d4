"""The few ops that are about storages and devices rather than values; every other op comes from plugins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch._prims_common import suggest_memory_format

from . import convert, errors
from ._execute import Program, state
from ._overlap import relation, repeats, shared_memory
from ._storage import TensorMeta, contiguous_strides, dense_meta, extent, grow, meta_of, physical_order
from ._viewing import as_strided
from ._views import View, intern_step, root, strided_view
from .tensor import Tensor, become, make, wrap

Rule = Callable[[tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[str, Rule] = {"aten::as_strided": as_strided}
aten = torch.ops.aten


def core_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of ops by qualified name."""

    def mark(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return mark


def current_index(device: Any) -> int:
    """Index of the device that a factory names, the current one where it names none."""
    if device is not None:
        device = torch.device(device)
        if device.index is not None and device.type in ("jax", "lazy"):
            return device.index
    from . import device as device_module

    return device_module.current_device()


# ---------------------------------------------------------------------- factories that hold no values
@core_rule("aten::empty.memory_format")
def empty(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A tensor of zeros that takes no memory before it is read."""
    dtype = _dtype_and_layout(kwargs)
    size = tuple(map(int, args[0] if args else kwargs["size"]))
    index = current_index(kwargs.get("device"))
    memory_format = kwargs.get("memory_format")
    if min(size, default=0) < 0 or memory_format not in (None, torch.contiguous_format):
        m = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)
        return _zeros(meta_of(size, tuple(m.stride()), dtype, index))
    return _zeros(dense_meta(size, dtype, index))


@core_rule("aten::empty_strided", "aten::new_empty_strided")
def empty_strided(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """As `empty`, with the strides asked for."""
    if isinstance(args[0], torch.Tensor):
        kwargs = {
            "dtype": args[0].dtype,
            "device": args[0].device,
            **{k: v for k, v in kwargs.items() if v is not None},
        }
        args = args[1:]
    dtype = _dtype_and_layout(kwargs)
    size, stride = tuple(map(int, args[0])), tuple(map(int, args[1]))
    torch.empty_strided(size, stride, dtype=dtype, device="meta")  # torch's own errors
    meta = meta_of(size, stride, dtype, current_index(kwargs.get("device")))
    if sorted(_dense_part(size, stride)) == sorted(_dense_part(size, _packed(meta))):
        return _zeros(meta)
    need = extent(size, stride)
    base = _zeros(dense_meta((need,), dtype, meta.index))
    return make(base._s, meta, strided_view(base._s.geometry, meta, 0))


def _packed(meta: TensorMeta) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose dimensions lie in the order of `meta`."""
    strides, n = [0] * len(meta.shape), 1
    for i in reversed(physical_order(meta)):
        strides[i] = n
        n *= max(meta.shape[i], 1)
    return tuple(strides)


def _dense_part(size: tuple[int, ...], stride: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(n, s) for n, s in zip(size, stride, strict=True) if n != 1] if math.prod(size) else []


def _dtype_and_layout(kwargs: dict[str, Any]) -> torch.dtype:
    layout = kwargs.get("layout")
    if layout not in (None, torch.strided):
        refuse_layout(layout)
    return kwargs.get("dtype") or torch.get_default_dtype()


def refuse_layout(layout: Any) -> None:
    raise errors.UnsupportedLayout(f"a tensor on device 'jax' is dense; got layout {layout}. Make it without layout=")


def _zeros(meta: TensorMeta) -> Tensor:
    if meta.index:
        convert.jax_device(meta.index)
    return wrap(np.broadcast_to(np.zeros((), meta.jax_dtype), meta.shape), meta)


# ---------------------------------------------------------------------- aliases
@core_rule("aten::alias", "aten::lift", "aten::lift_fresh", "aten::_fw_primal")
def alias(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Another tensor on the same storage, the same view."""
    t = args[0]
    if type(t) is not Tensor:
        return t
    twin = make(t._s, t._m, t._v)
    if t._cache is not None:
        twin._cache = t._cache
    return twin


@core_rule("aten::as_strided_copy")
def as_strided_copy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What `as_strided` shows, which depends on the storage."""
    return aten.clone.default(as_strided(args, kwargs), memory_format=torch.contiguous_format)


@core_rule("aten::as_strided_scatter")
def as_strided_scatter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A copy of the storage with `src` in the window that `as_strided` gives; the tensor's place in the copy."""
    t, src, *rest = args
    n, offset = t._s.nbytes // t.dtype.itemsize, t.storage_offset()
    copy = aten.clone.default(t if repeats(t._m) else as_strided((t, (n,), (1,), 0), {}))
    if not repeats(t._m):
        copy = as_strided((copy, t._m.shape, t._m.strides, offset), {})
    window = as_strided((copy, *rest), kwargs)
    if tuple(src.shape) != window._m.shape:
        raise RuntimeError(
            f"expected src to have a size equal to the slice of self. src size = {list(src.shape)}, slice size = {list(window.shape)}"
        )
    copy_((window, src), {})
    return copy


@core_rule("aten::detach")
def detach(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An alias; where JAX differentiates the trace, one that stops its gradients."""
    twin = alias(args, kwargs)
    owner = state.executor.owner
    if owner is None or not owner.stop_gradients or type(twin) is not Tensor:
        return twin
    view = twin._v
    chain = root(twin._s.geometry) if view is None else view.chain
    positions, offset = ((), 0) if view is None else (view.positions, view.offset)
    return make(twin._s, twin._m, View(chain.then(_STOP), positions, offset))


_STOP = intern_step("aten::detach", jax.lax.stop_gradient, lambda base, value: value, (), 0)


@core_rule("aten::set_.source_Tensor")
def set_source_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    t, source = args
    if type(source) is not Tensor or source.dtype != t.dtype:
        raise RuntimeError(f"set_ needs a tensor of {t.dtype} on {t.device}; got {source.dtype} on {source.device}")
    become(t, source)
    return t


@core_rule("aten::set_.source_Storage_storage_offset", "aten::set_.source_Storage", "aten::set_")
def set_source_storage(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`set_` to a storage: of ours, or a CPU one that `torch.load` has read for us."""
    from ._loading import tensor_on_storage

    t = args[0]
    if len(args) == 1:
        become(t, _zeros(dense_meta((0,), t.dtype, t._m.index)))
    else:
        become(t, tensor_on_storage(t, *args[1:]))
    return t


@core_rule("aten::resize_")
def resize_rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    t, size = args[0], tuple(map(int, args[1]))
    memory_format = kwargs.get("memory_format")
    strides = contiguous_strides(size)
    if memory_format not in (None, torch.contiguous_format, torch.preserve_format):
        strides = tuple(torch.empty(size, device="meta", memory_format=memory_format).stride())
    if size != t._m.shape or (memory_format is not None and strides != t._m.strides):
        resize(t, size, strides)
    return t


@core_rule("aten::resize_as_")
def resize_as(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`resize_` to the size of another tensor, which lends its strides only for ``memory_format=torch.preserve_format``."""
    t, like = args
    memory_format = kwargs.get("memory_format")
    resize_rule((t, like.shape), {})
    if memory_format is torch.preserve_format:
        memory_format = suggest_memory_format(like)
    return t if memory_format is None else resize_rule((t, like.shape), {"memory_format": memory_format})


def resize(t: Tensor, size: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Give `t` another size: the storage keeps its elements in memory order, and grows where it must."""
    storage, offset = t._s, t.storage_offset()
    meta = meta_of(size, strides, t.dtype, t._m.index)
    need = offset + extent(size, strides) if meta.numel else 0
    geometry = storage.geometry
    if storage.nbytes < need * meta.jax_dtype.itemsize:
        if geometry.numel == 0 and t._v is None:
            become(t, _zeros(meta))
            return
        elements = -(-need * meta.jax_dtype.itemsize // geometry.jax_dtype.itemsize)
        grown = wrap(
            _flat_grown(state.executor.load(storage), geometry, elements),
            dense_meta((elements,), geometry.dtype, geometry.index),
        )
        storage = grow(storage, grown._s)
        geometry = storage.geometry
    whole = offset == 0 and meta is geometry
    become(t, make(storage, meta, None if whole else strided_view(geometry, meta, offset)))


def _flat_grown(value: Any, geometry: TensorMeta, n: int) -> Any:
    order, m = physical_order(geometry), geometry.numel
    program = Program(
        lambda v: jnp.pad(jnp.transpose(v, order).reshape(-1), (0, n - m)),
        "aten::resize_",
        geometry.wide,
        geometry.index,
    )
    return state.executor.run(program, (value,))


@core_rule("aten::is_set_to")
def is_set_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    a, b = args
    return (
        a._s is b._s
        and a.storage_offset() == b.storage_offset()
        and (a._m.shape, a._m.strides) == (b._m.shape, b._m.strides)
    )


@core_rule("aten::record_stream")
def record_stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Nothing to do: JAX orders its own queues."""


# ---------------------------------------------------------------------- between devices
@core_rule("aten::copy_")
def copy_(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dst, src = args[0], args[1]
    if type(dst) is not Tensor:
        return dst.copy_(convert.to_cpu(src, "copying it to CPU"))
    if repeats(dst._m):
        raise shared_memory("more than one element of the written-to tensor")
    if type(src) is Tensor and src._s is dst._s and relation(dst, src) == "partial":
        raise shared_memory("some elements of the input tensor and the written-to tensor")
    target = dst._m
    if type(src) is Tensor:
        source, value = src._m, state.executor.read(src)
        if source.index != target.index:
            value = _moved(value, target.index)
    else:
        if src.dtype != target.dtype:
            src = src.to(target.dtype)  # before the transfer: torch's own cast
        value, source = convert.to_array(src, target.index), dense_meta(tuple(src.shape), src.dtype, target.index)
    if source.shape != target.shape:
        try:
            torch.broadcast_shapes(source.shape, target.shape)
            fits = torch.Size(np.broadcast_shapes(source.shape, target.shape)) == target.shape
        except (RuntimeError, ValueError):
            fits = False
        if not fits:
            target.fresh_on_meta().copy_(source.on_meta())  # torch says why
    if (
        type(src) is Tensor and (source.shape != target.shape or source.dtype != target.dtype)
    ) or source.shape != target.shape:
        value = convert.fit(value, source, target)
    elif type(src) is Tensor:
        value = convert.copied(value) if dst._v is None and source.index == target.index else value
    state.executor.write(dst, value)
    return dst


@core_rule("aten::_to_copy")
def to_copy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    t, target = args[0], kwargs.get("device")
    dtype = kwargs.get("dtype") or t.dtype
    index = t._m.index if type(t) is Tensor else 0
    if target is not None:
        target = torch.device(target)
        if target.type in ("jax", "lazy"):
            index = current_index(target) if target.index is not None or type(t) is not Tensor else index
        elif target.type == "meta":
            return torch.empty_like(t._m.on_meta(), dtype=dtype, memory_format=kwargs.get("memory_format"))
        else:
            host = convert.to_cpu(t)
            return host.to(
                device=target, dtype=dtype, memory_format=kwargs.get("memory_format") or torch.preserve_format
            )
    if type(t) is not Tensor:
        return convert.from_cpu(t, index, dtype)
    if index != t._m.index:
        moved = wrap(_moved(state.executor.read(t), index), meta_of(t._m.shape, _dense_strides(t._m), t.dtype, index))
        return moved if moved.dtype == dtype else to_copy((moved,), {"dtype": dtype})
    meta = t._m
    if kwargs.get("memory_format") in (None, torch.preserve_format):
        strides = _dense_strides(meta)
    else:
        strides = tuple(torch.empty_like(meta.on_meta(), memory_format=kwargs["memory_format"]).stride())
    out = meta_of(meta.shape, strides, dtype, index)
    value = state.executor.read(t)
    value = convert.copied(value) if dtype == meta.dtype else convert.fit(value, meta, out)
    return wrap(value, out)


def _dense_strides(meta: TensorMeta) -> tuple[int, ...]:
    return meta.strides if meta.contiguous else tuple(torch.empty_like(meta.on_meta()).stride())


def _moved(value: Any, index: int) -> Any:
    import jax

    with jax.enable_x64(True):
        return jax.device_put(value, convert.jax_device(index))


@core_rule("aten::_local_scalar_dense")
def local_scalar_dense(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t = args[0]
    value = convert.host_array(state.executor.read(t), "a Python number (item(), bool(), int(), float(), an if)")
    return value.item() if value.dtype.isbuiltin == 1 else float(value.reshape(()))  # bfloat16: no number of Python's


@core_rule("aten::equal")
def equal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    a, b = args
    if a.device != b.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {a.device} and {b.device}!"
        )
    if a.shape != b.shape:
        return False
    x, y = (convert.host_array(state.executor.read(t), "torch.equal") for t in (a, b))
    return bool((x == y).all())


@core_rule("aten::_has_compatible_shallow_copy_type")
def has_compatible_shallow_copy_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return isinstance(args[0], Tensor) and isinstance(args[1], Tensor)


@core_rule("aten::_nested_tensor_from_mask_left_aligned")
def nested_tensor_from_mask_left_aligned(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """No: nested tensors have no JAX counterpart, so `nn.TransformerEncoder` must not take that path."""
    return False


@core_rule("aten::_pack_padded_sequence")
def pack_padded_sequence(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths and batch sizes are on CPU, so CPU torch packs the numbers of the steps, by which the steps are gathered."""
    data, lengths, batch_first = args
    numbers = torch.arange(data.shape[0] * data.shape[1]).view(data.shape[:2])
    order, batch_sizes = torch._pack_padded_sequence(numbers, lengths, batch_first)
    return data.flatten(0, 1).index_select(0, order.to(data.device)), batch_sizes
