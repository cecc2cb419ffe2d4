"""`torch.load(map_location="jax")`: CPU storages that are read for us, and `set_` onto them."""

from __future__ import annotations

from typing import Any

import torch

from . import convert
from ._storage import StorageView, contiguous_strides, meta_of
from ._views import strided_view
from .tensor import Tensor, make


class LoadedStorage(torch.UntypedStorage):
    """A CPU storage that calls itself a storage on device ``jax``: torch then asks for a tensor there and `set_`s it."""

    _target: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._target


def deserialize(storage: Any, location: str) -> Any:
    """`torch.serialization`'s hook: storages for location ``jax`` or ``jax:N``."""
    if not str(location).startswith("jax"):
        return None
    target = torch.device(location)
    if target.type != "jax":
        return None
    convert.jax_device(target.index or 0)
    loaded = storage._weak_ref() if False else LoadedStorage._new_with_weak_ptr(storage._weak_ref())
    loaded._target = torch.device("jax", target.index or 0)
    loaded._source = storage
    return loaded


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
        return make(storage._storage, meta, strided_view(geometry, size, stride, offset))
    cpu = torch.empty(0, dtype=t.dtype)
    source = getattr(storage, "_source", storage)
    if size is None:
        cpu.set_(source)
    else:
        cpu.set_(source, offset, tuple(size), tuple(stride or contiguous_strides(tuple(size))))
    restored = convert.restore(cpu, t.device)
    assert isinstance(restored, Tensor)
    return restored


def install() -> None:
    """Tell `torch.load` about device ``jax``."""
    torch.serialization.register_package(30, tag, deserialize)
