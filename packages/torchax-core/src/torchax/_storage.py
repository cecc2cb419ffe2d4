"""What tensors share: interned metadata, and the storage that holds a payload."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from . import dtypes


class TensorMeta:
    """Shape, strides, dtype and device index of a tensor. Interned: equal metadata is the same object, so it is a cheap key."""

    __slots__ = (
        "contiguous",
        "cpp_device",
        "device",
        "dtype",
        "index",
        "jax_dtype",
        "numel",
        "on_meta_",
        "root",
        "shape",
        "strides",
        "wide",
    )

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    on_meta_: torch.Tensor | None

    def on_meta(self) -> torch.Tensor:
        """A tensor of this metadata on device ``meta`` (shared: do not change it)."""
        if self.on_meta_ is None:
            self.on_meta_ = self.fresh_on_meta()
        return self.on_meta_

    def fresh_on_meta(self) -> torch.Tensor:
        """A new tensor of this metadata on device ``meta``."""
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")

    def __repr__(self) -> str:
        return f"TensorMeta(shape={self.shape}, strides={self.strides}, dtype={self.dtype}, device='jax:{self.index}')"


_interned: dict[tuple[Any, ...], TensorMeta] = {}


def meta_of(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, index: int = 0) -> TensorMeta:
    """The one `TensorMeta` of these values."""
    key = (shape, strides, dtype, index)
    meta = _interned.get(key)
    if meta is None:
        meta = TensorMeta()
        meta.shape, meta.strides, meta.dtype, meta.index = (
            tuple(map(int, shape)),
            tuple(map(int, strides)),
            dtype,
            index,
        )
        meta.jax_dtype, meta.wide, meta.numel = dtypes.to_jax(dtype), dtypes.is_wide(dtype), math.prod(shape)
        meta.device, meta.cpp_device = torch.device("jax", index), torch.device("lazy", index)
        meta.contiguous = meta.strides == contiguous_strides(meta.shape)
        meta.on_meta_ = meta.root = None
        meta = _interned.setdefault(key, meta)  # another thread may have been faster: identity counts
    return meta


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major tensor."""
    strides, n = [], 1
    for size in reversed(shape):
        strides.append(n)
        n *= max(size, 1)
    return tuple(reversed(strides))


def dense_meta(shape: tuple[int, ...], dtype: torch.dtype, index: int = 0) -> TensorMeta:
    """Row-major metadata."""
    return meta_of(shape, contiguous_strides(shape), dtype, index)


def numpy_strides(x: np.ndarray) -> tuple[int, ...] | None:
    """Strides of a NumPy array in elements; None of one that is empty, has gaps or repeats elements."""
    order = np.argsort([-s for s in x.strides], kind="stable")
    if not x.transpose(order).flags.c_contiguous or min(x.strides, default=1) <= 0 or not x.size:
        return None
    return tuple(s // x.itemsize for s in x.strides)


_addresses = itertools.count(1)


class Storage:
    """A payload that tensors share.

    Attributes:
        value: the `jax.Array` in its logical shape (or a tracer).
        geometry: shape and strides of `value` in memory, as `as_strided` counts.
        version: grows with every write; views remember the version that they read.
        owner: the trace that it was made in, else None.
        sharding: how the payload is laid out over devices, whatever is written; None leaves it to XLA.
        left: how often a tensor that had it was given another one.
    """

    owner: Any = None
    sharding: Any = None
    version = 0
    left = 0
    _address: int | None = None

    def __init__(self, value: Any, geometry: TensorMeta):
        self.value = value
        self.geometry = geometry

    @property
    def nbytes(self) -> int:
        """Bytes that the storage holds."""
        return self.geometry.numel * self.geometry.jax_dtype.itemsize

    @property
    def address(self) -> int:
        """A number that tells storages apart, as `data_ptr` does; no memory is there."""
        if self._address is None:  # far apart, so that offsets into one storage never reach another
            self._address = next(_addresses) << 44
        return self._address


class GrownStorage(Storage):
    """What other tensors hold of a storage that `resize_` made larger: a window onto the larger one."""

    _larger: Storage

    @property
    def value(self) -> Any:  # type: ignore[override]
        geometry, order = self.geometry, physical_order(self.geometry)
        flat = self._larger.value[: geometry.numel]
        return flat.reshape([geometry.shape[i] for i in order]).transpose(np.argsort(order))

    @value.setter
    def value(self, value: Any) -> None:
        order, larger = physical_order(self.geometry), self._larger
        larger.value = larger.value.at[: self.geometry.numel].set(value.transpose(order).reshape(-1))
        larger.version += 1

    @property
    def version(self) -> int:  # type: ignore[override]
        return self._larger.version

    @version.setter
    def version(self, version: int) -> None:
        pass  # writing the value has counted


class PendingStorage(Storage):
    """A storage whose payload is made when it is first asked for; it is a plain one from then on."""

    def __init__(self, make: Callable[[], Any], geometry: TensorMeta):
        self._make, self.geometry = make, geometry

    @property
    def value(self) -> Any:  # type: ignore[override]
        self.value = value = self._make()
        return value

    @value.setter
    def value(self, value: Any) -> None:
        self.__class__ = Storage  # pyright: ignore[reportAttributeAccessIssue]
        self.value = value
        self.__dict__.pop("_make", None)


def grow(storage: Storage, larger: Storage) -> Storage:
    """Let every tensor on `storage` share the memory of `larger`, which begins with the same elements. Gives `larger`."""
    larger._address, larger.version = storage.address, storage.version + 1
    del storage.value
    storage.__dict__.pop("version", None)
    storage.__class__ = GrownStorage
    storage._larger = larger  # type: ignore[attr-defined]
    return larger


class StorageView:
    """What `Tensor.untyped_storage` returns: identity and size of the storage that tensors share."""

    def __init__(self, storage: Storage, device: torch.device):
        self._storage, self.device = storage, device

    def data_ptr(self) -> int:
        """A number that is the same for all tensors on this storage; it is not an address."""
        return self._storage.address if self._storage.nbytes else 0

    @property
    def _cdata(self) -> int:
        return self._storage.address

    def nbytes(self) -> int:
        """Size in bytes."""
        return self._storage.nbytes

    size = __len__ = nbytes

    def element_size(self) -> int:
        """One: an untyped storage counts bytes."""
        return 1

    def is_pinned(self, device: Any = None) -> bool:
        """Never: this is device memory."""
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorageView) and other._storage is self._storage

    def __hash__(self) -> int:
        return id(self._storage)

    def __repr__(self) -> str:
        return f"<torchax storage of {self.nbytes()} bytes on {self.device}>"


def extent(shape: Iterable[int], strides: Iterable[int]) -> int:
    """The least number of elements in a storage that holds a tensor of this shape and these strides."""
    reach = 1
    for n, s in zip(shape, strides, strict=True):
        if n == 0:
            return 0
        reach += (n - 1) * s
    return reach


def physical_order(geometry: TensorMeta) -> list[int]:
    """Dimensions of the storage's array from the slowest to the fastest in memory."""
    return sorted(range(len(geometry.shape)), key=lambda i: (-geometry.strides[i], i))


def strided_indices(shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> np.ndarray:
    """Flat memory index of every element of a strided view, an int64 array of `shape`."""
    index = np.full((), offset, np.int64)
    for size, stride in zip(shape, strides, strict=True):
        index = index[..., None] + np.arange(size, dtype=np.int64) * stride
    return index
