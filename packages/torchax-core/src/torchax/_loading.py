"""`torch.load(map_location="jax")`: stand-ins for CPU storages that were read, and `set_` onto them."""

from __future__ import annotations

from typing import Any

import torch

from . import convert
from ._core_ops import current_index
from ._storage import StorageView, contiguous_strides, meta_of
from ._views import strided_view
from .tensor import Tensor, make


class LoadedStorage(torch.UntypedStorage):
    """A storage that calls itself one on device ``jax``: torch then asks for a tensor there and `set_`s it. The bytes are in `source`."""

    target: torch.device
    source: torch.UntypedStorage

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.target

    def nbytes(self) -> int:
        return self.source.nbytes()

    size = __len__ = nbytes

    def data_ptr(self) -> int:  # not 0, else torch does not remember that it has read this one
        return self.source.data_ptr()

    def _set_from_file(self, *args: Any) -> Any:  # the old format reads the bytes last
        return self.source._set_from_file(*args)  # type: ignore[attr-defined]


def deserialize(storage: Any, location: str) -> Any:
    """`torch.serialization`'s hook: storages for location ``jax`` or ``jax:N``."""
    if not str(location).startswith("jax"):
        return None
    target = torch.device("jax", current_index(location))
    with forgetting_location():
        convert.jax_device(target.index)
    loaded = LoadedStorage(0)
    loaded.target, loaded.source = target, getattr(storage, "source", storage)
    return loaded


class forgetting_location:
    """torch keeps the ``map_location`` of a `torch.load` that failed, and would apply it to the next plain `pickle.load`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *exc: object) -> None:
        if kind is not None:
            torch.serialization._serialization_tls.map_location = None


def tag(storage: Any) -> str | None:
    """`torch.serialization`'s hook: our tensors write their values as CPU storages, so none is ours."""
    return None


def tensor_on_storage(t: Tensor, storage: Any, offset: int = 0, size: Any = None, stride: Any = None) -> Tensor:
    """A tensor of the dtype of `t` over a storage of ours or a loaded one."""
    if isinstance(storage, StorageView):
        geometry = storage._storage.geometry
        size = (geometry.numel,) if size is None else tuple(size)
        stride = contiguous_strides(size) if not stride else tuple(stride)
        meta = meta_of(size, stride, t.dtype, geometry.index)
        return make(storage._storage, meta, strided_view(geometry, meta, offset))
    cpu = torch.empty(0, dtype=t.dtype)
    source = getattr(storage, "source", storage)
    if size is None:
        cpu.set_(source)
    else:
        cpu.set_(source, offset, tuple(size), tuple(stride or contiguous_strides(tuple(size))))
    restored = convert.restore(cpu, t.device)
    assert isinstance(restored, Tensor)
    return restored


def install() -> None:
    """Tell `torch.load` about device ``jax``, before torch's own hook, which would copy bytes to the device."""
    torch.serialization.register_package(5, tag, deserialize)
