"""Values between torch on CPU, numpy and JAX."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from . import dtypes, errors
from ._checks import settle
from ._execute import Program, state
from ._execute.known import known_value
from ._registry import REGISTRY
from ._storage import PendingStorage, Storage, TensorMeta, dense_meta, meta_of, physical_order
from ._views import strided_view
from .tensor import Tensor, make, wrap

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---------------------------------------------------------------------- public: the two worlds
def t2j(tensor: Any, use_dlpack: bool = False) -> Any:
    """The values of a torch tensor as a `jax.Array` of the same shape and dtype.

    A tensor on device ``jax`` gives its own array. A CPU tensor is copied, since a `jax.Array` must not change under
    later writes; hand memory over without a copy with ``jax.dlpack.from_dlpack(tensor)``.

    Args:
        tensor: a tensor, or a nest of tensors, which gives a nest of arrays.
        use_dlpack: taken as earlier versions took it; it changes nothing.
    """
    if isinstance(tensor, Tensor):
        return tensor._array()
    if isinstance(tensor, torch.Tensor):
        return to_array(tensor.detach(), 0)
    if not any(isinstance(x, torch.Tensor) for x in tree_leaves(tensor)):
        raise TypeError(f"t2j takes a torch.Tensor, or a nest of them; got {type(tensor).__name__}")
    return tree_map(lambda x: t2j(x) if isinstance(x, torch.Tensor) else x, tensor)


def j2t(array: Any, use_dlpack: bool = False) -> Any:
    """The values of a `jax.Array`, or of a tensor on device ``jax``, as a CPU tensor of the same shape and dtype.

    `torchax.interop.torch_view` gives a tensor on device ``jax`` that holds the array itself.

    Args:
        array: an array, or a nest of arrays, which gives a nest of tensors.
        use_dlpack: taken as earlier versions took it; it changes nothing.
    """
    if isinstance(array, Tensor):
        return array.detach().cpu()
    if isinstance(array, jax.Array):
        return Tensor(array).cpu()
    if not any(isinstance(x, jax.Array | Tensor) for x in tree_leaves(array)):
        raise TypeError(f"j2t takes a jax.Array, or a nest of them; got {type(array).__name__}")
    return tree_map(lambda x: j2t(x) if isinstance(x, jax.Array | Tensor) else x, array)


def from_dlpack(source: Any) -> Tensor:
    """A tensor on device ``jax`` over the memory of `source` (anything with ``__dlpack__``), without a copy where the platform allows.

    The memory belongs to both afterwards: do not write it through `source`.
    """
    if isinstance(source, Tensor):
        return source
    if isinstance(source, torch.Tensor) and source.is_conj():
        source = source.resolve_conj()
    with jax.enable_x64(True):
        return Tensor(jax.dlpack.from_dlpack(source))


# ---------------------------------------------------------------------- CPU -> JAX
def to_array(t: torch.Tensor, index: int) -> jax.Array:
    """A CPU tensor's values on JAX device `index`."""
    return on_device(host_values(t), index)


def host_values(t: torch.Tensor) -> np.ndarray:
    """A CPU tensor's values as a numpy array of their own."""
    check_dense(t)
    dtype = dtypes.to_jax(t.dtype)
    # a copy first: torch never resizes a tensor again whose memory numpy has seen
    t = t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return t.view(_BITS[t.element_size()]).numpy().view(dtype) if dtype.isbuiltin == 2 else t.numpy()


def on_device(values: np.ndarray, index: int) -> jax.Array:
    """Numpy values on JAX device `index`. On the first one they are free to follow where other operands lie (sharded ones, say)."""
    device = jax_device(index)
    with jax.enable_x64(True):
        return jax.device_put(values, device if index else None)


def from_cpu(t: torch.Tensor, index: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """A CPU tensor's values as a tensor on device ``jax``, dense strides as ``empty_like`` gives them."""
    if dtype is not None and t.dtype != dtype:
        t = t.to(dtype)
    strides = tuple(t.stride()) if t.is_contiguous() else tuple(torch.empty_like(t, device="meta").stride())
    return wrap(to_array(t, index), meta_of(tuple(t.shape), strides, t.dtype, index))


def check_dense(t: torch.Tensor) -> None:
    """Refuse what a `jax.Array` cannot hold.

    Raises:
        UnsupportedLayout: sparse, mkldnn or jagged.
        UnsupportedDtype: quantized.
    """
    if t.layout is not torch.strided or t.is_nested:
        raise errors.UnsupportedLayout(
            f"a tensor on device 'jax' is dense; got {'a nested tensor' if t.is_nested else f'layout {t.layout}'}. Convert it first with .to_dense()"
        )
    if t.is_quantized:
        raise errors.UnsupportedDtype(
            f"a tensor on device 'jax' cannot hold quantized dtype {t.dtype}; convert it first with .dequantize()"
        )


def jax_device(index: int) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """JAX device number `index` of the default platform, among those of this process.

    Raises:
        PlatformUnavailable: there is no such device, or none at all.
    """
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        raise errors.PlatformUnavailable(
            f"device 'jax:{index}' does not exist, since JAX could not start: {error}. The environment variable JAX_PLATFORMS "
            f"is {os.environ.get('JAX_PLATFORMS', '')!r}; leave it unset, or name a platform that this machine has"
        ) from error
    if not 0 <= index < len(devices):
        raise errors.PlatformUnavailable(
            f"device 'jax:{index}' does not exist: JAX platform {jax.default_backend()!r} has {len(devices)} device(s), "
            f"'jax:0' to 'jax:{len(devices) - 1}'"
        )
    return devices[index]


EVERY_PLATFORM = "every platform"  # as a platform's name: that of lowerings that name none
_target: str | None = None
_portable = False


def platform(index: int) -> str:
    """``cpu``, ``gpu`` or ``tpu``: the platform that device ``jax:index`` computes on, or is being compiled for."""
    return _target or jax_device(index).platform


@contextlib.contextmanager
def compiling_for(name: str, portable: bool = False) -> Iterator[None]:
    """Within, lowerings are chosen for another platform than this machine's: to trace what is compiled ahead of time.

    Args:
        name: ``cpu``, ``gpu`` or ``tpu``; `EVERY_PLATFORM` for a program of several.
        portable: the program is kept, for other versions of XLA, too: see `portable`.
    """
    global _target, _portable
    before = _target, _portable
    _target, _portable = name, portable
    REGISTRY.changed()
    try:
        yield
    finally:
        _target, _portable = before
        REGISTRY.changed()


def portable() -> bool:
    """Whether what is traced now may call only what JAX promises to support in later versions, as `jax.export` asks."""
    return _portable


# ---------------------------------------------------------------------- JAX -> CPU
def host_array(value: Any, what: str) -> np.ndarray:
    """The values as numpy, once computed.

    Raises:
        TracerEscaped: they are being traced and follow from more than numbers.
        Exception: what an earlier op found wrong with values (`_checks`).
    """
    if isinstance(value, jax.core.Tracer) and (known := known_value(value)) is not None:
        value = known
    if isinstance(value, jax.core.Tracer):
        from ._execute._where import user_line

        when = (
            "is being traced"
            if state.executor.owner is not None
            else "belongs to a function whose tracing has ended (or goes on)"
        )
        raise errors.TracerEscaped(
            f"{what} needs the values of a tensor that {when}{user_line()}; Python's if, while and numbers know no "
            "such values. Inside of a compiled function use torch.where or torch.cond for an if, torch.while_loop or "
            "torch._higher_order_ops.scan and associative_scan for loops, tensor arithmetic for numbers; or do this outside of it"
        )
    settle()
    try:
        return np.asarray(value)
    except RuntimeError as error:
        if "deleted" in str(error):
            raise errors.BufferDonated(
                f"{what}: the tensor's buffer was given away (donated) to a compiled function, which has overwritten it. "
                "Use the tensor that was written, make a copy before the call (.clone(), jnp.copy), or compile with donate_state=False"
            ) from error
        if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
            raise errors.PlatformUnavailable(
                f"{what}: the tensor is divided over several processes ({value.sharding}) and this one holds only a part of it. "
                "Call .full_tensor() in all processes first, or save it with torchax.save_checkpoint"
            ) from error
        raise


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A CPU tensor with a copy of `array`."""
    dtype = dtypes.to_torch(array.dtype)
    if not array.size:  # numpy's strides are not torch's
        return torch.empty(array.shape, dtype=dtype)
    if array.dtype.isbuiltin == 2:
        bits = _BITS[array.dtype.itemsize]
        return torch.from_numpy(np.array(array).reshape(array.shape).view(dtypes.to_jax(bits))).view(dtype)
    return torch.from_numpy(np.array(array)) if array.ndim else torch.tensor(array[()].item(), dtype=dtype)


def to_cpu(t: Tensor, what: str = "moving it to CPU") -> torch.Tensor:
    """A CPU tensor with the values, and strides as a copy on CPU would have."""
    r = to_torch(host_array(state.executor.read(t), what))
    if t._m.contiguous:
        return r
    strides = torch.empty_like(t._m.on_meta()).stride()
    return r if r.stride() == strides else torch.empty_strided(t._m.shape, strides, dtype=r.dtype).copy_(r)


def copied(value: Any) -> Any:
    """The same values in a buffer of their own."""
    return value if isinstance(value, jax.core.Tracer) else jnp.copy(value)


# ---------------------------------------------------------------------- whole storages, for pickles and deep copies
_hosts: weakref.WeakKeyDictionary[Storage, tuple[int, StorageWeakRef]] = weakref.WeakKeyDictionary()
_twins: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[Storage]]] = {}


def host_storage(storage: Storage) -> torch.Tensor:
    """The storage's memory as a flat CPU tensor; the same CPU storage as long as someone holds it."""
    known = _hosts.get(storage)
    dtype = storage.geometry.dtype
    if known is not None and known[0] == storage.version:
        alive = torch.UntypedStorage._new_with_weak_ptr(known[1].cdata)
        if alive is not None:
            return torch.empty(0, dtype=dtype).set_(alive)  # type: ignore[call-overload]
    array = host_array(state.executor.load(storage), "saving it")
    flat = to_torch(np.ascontiguousarray(array.transpose(physical_order(storage.geometry))).reshape(-1))
    _hosts[storage] = (storage.version, StorageWeakRef(flat.untyped_storage()))
    return flat


def restore(values: torch.Tensor, target: torch.device) -> torch.Tensor:
    """A CPU tensor on `target`; tensors that share a CPU storage share one on device ``jax``."""
    if target.type != "jax":
        return values if target.type == "cpu" else values.to(target)
    if isinstance(values, Tensor):  # torch.load(map_location="jax") of what was saved on device jax
        if values._m.index == (target.index or 0):
            return values
        values = to_cpu(values)
    cpu = values.untyped_storage()
    known = _twins.get((cpu._cdata, target.index or 0))
    storage = known[1]() if known is not None and not known[0].expired() else None
    index = target.index or 0
    if storage is None:
        if values.is_contiguous() and values.numel() * values.element_size() == cpu.nbytes():
            whole = values
        else:
            whole = torch.empty(0, dtype=values.dtype).set_(cpu)  # type: ignore[call-overload]
        jax_device(index)
        geometry = dense_meta(tuple(whole.shape), whole.dtype, index)
        storage = PendingStorage(
            lambda: to_array(whole, index), geometry
        )  # torch's old file format reads the bytes last
        for key in [k for k, (ref, _) in _twins.items() if ref.expired()]:
            del _twins[key]
        _twins[cpu._cdata, index] = (StorageWeakRef(cpu), weakref.ref(storage))
    meta = meta_of(tuple(values.shape), tuple(values.stride()), values.dtype, index)
    if values.storage_offset() == 0 and meta is storage.geometry:
        return make(storage, meta)
    return make(storage, meta, strided_view(storage.geometry, meta, int(values.storage_offset())))


def fit(value: Any, source: TensorMeta | None, target: TensorMeta) -> Any:
    """`value` broadcast (in the shape of `target` if it has as many elements) and cast to the shape and dtype of `target`."""
    key = (source, target.shape, target.dtype, target.index)
    program = _fits.get(key) if source is not None else None
    if program is None:
        shape, dtype = target.shape, target.jax_dtype
        program = Program(
            lambda v: cast(v.reshape(shape) if v.size == target.numel else jnp.broadcast_to(v, shape), dtype),
            "aten::copy",
            target.wide or source is None or source.wide,
            target.index,
        )
        if source is not None:
            _fits[key] = program
    return state.executor.run(program, (value,))


_fits: dict[Any, Program] = {}


def cast(x: Any, dtype: np.dtype) -> Any:
    """`x` converted to `dtype` with the results of CPU torch, where C++ leaves them undefined, too.

    A float outside of the range of the integer type (and NaN) becomes the smallest int32 or int64; narrower
    integers wrap around. float8_e4m3fn has no infinity: what is too large becomes the largest number. A complex number
    loses its imaginary part; all but zero is True.
    """
    if x.dtype == dtype:
        return x
    if dtype == np.bool_:
        return x != 0
    if jnp.issubdtype(x.dtype, jnp.complexfloating) and dtype.kind != "c":
        x = jnp.real(x)
    if jnp.issubdtype(x.dtype, jnp.floating) and dtype.kind in "iu":
        x = x.astype(np.float32) if x.dtype.itemsize < 4 else x
        if dtype == np.uint64:  # 2**63 and above do not pass through int64; negative numbers wrap around
            high = jnp.where(x < 2.0**64, x, 0).astype(dtype)
            return jnp.where(x >= 2.0**63, high, _to_int(x, np.dtype(np.int64)).astype(dtype))
        via = np.dtype(np.int64 if dtype.itemsize == 8 or dtype == np.uint32 else np.int32)
        with jax.enable_x64(True):  # uint32 goes through int64 where nothing else is wide
            return _to_int(x, via).astype(dtype)
    if dtype == jnp.float8_e4m3fn:
        x = x if x.dtype.itemsize > 1 and jnp.issubdtype(x.dtype, jnp.floating) else x.astype(np.float32)
        x = jnp.clip(x, -448, 448)  # NaN stays
    return x.astype(dtype)


def _to_int(x: Any, dtype: np.dtype) -> Any:
    info = np.iinfo(dtype)
    inside = (x >= float(info.min)) & (x < -float(info.min))
    return jnp.where(inside, x, 0).astype(dtype) + jnp.where(inside, 0, info.min).astype(dtype)


__all__ = ["from_dlpack", "j2t", "t2j"]
