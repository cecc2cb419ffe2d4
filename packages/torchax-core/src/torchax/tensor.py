"""`Tensor`: a `torch.Tensor` on device ``jax``, a (storage, view) pair that holds a `jax.Array`.

C++ sees device type ``lazy`` (its guards do not call into Python, and backward stays in the calling thread); Python
sees ``jax:0``. What C++ refuses to a subclass is a plain method here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.core
import numpy as np
import torch

from . import dtypes, errors
from ._checks import settle
from ._dispatch import dispatch
from ._execute import state
from ._execute.known import known_value
from ._marks import Marked, leave
from ._sharding import pins, place
from ._storage import Storage, StorageView, TensorMeta, dense_meta

if TYPE_CHECKING:
    from ._views import View

# the methods jax() and torch() hide the modules inside the class
Array: TypeAlias = jax.Array
TorchTensor: TypeAlias = torch.Tensor
Device: TypeAlias = torch.device
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # pyright: ignore[reportAttributeAccessIssue]
_make_subclass = torch.Tensor._make_wrapper_subclass
_strided = torch.strided


OWN = frozenset({"_s", "_m", "_v", "_cache", "_is_param"})  # attributes that are not the user's


class Tensor(Marked):
    """A PyTorch tensor whose values are a `jax.Array`.

    ``Tensor(array)`` wraps an array (or a tracer) without a copy; tensors on device ``jax`` also come from every
    torch factory with ``device="jax"`` and from ``.to("jax")``.

    Args:
        elem: the `jax.Array` to wrap, of any shape and a dtype that torch knows.
        env: accepted for compatibility, unused.
        requires_grad: as for `torch.tensor`.
    """

    _s: Storage
    _m: TensorMeta
    _v: View | None = None
    _cache: tuple[int, Any] | None = None  # the storage's version and the view's value then

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    __torch_dispatch__ = classmethod(dispatch)  # type: ignore[assignment]

    if TYPE_CHECKING:  # what torch declares less narrowly

        def detach(self) -> Tensor: ...
        def requires_grad_(self, mode: bool = True) -> Tensor: ...
        def storage_offset(self) -> int: ...

    @staticmethod
    def __new__(cls: type[Tensor], elem: Any, env: Any = None, requires_grad: bool = False) -> Tensor:
        if isinstance(elem, Tensor):
            elem = elem._array()
        if not isinstance(elem, jax.Array):
            raise TypeError(
                f"torchax.tensor.Tensor wraps a jax.Array; got {type(elem).__name__}. For numbers, lists and numpy arrays "
                'use torch.tensor(..., device="jax"), for CPU tensors .to("jax")'
            )
        t = wrap(elem, dense_meta(tuple(elem.shape), dtypes.to_torch(elem.dtype), _index_of(elem)))
        return t.requires_grad_() if requires_grad else t

    def __init__(self, elem: Any, env: Any = None, requires_grad: bool = False):
        pass

    # ------------------------------------------------------------------ the JAX side
    def jax(self) -> Array:
        """The value as a `jax.Array` of the same shape (no copy where the tensor is not a view).

        While a function is traced it is a tracer, except for integers and bools that follow from numbers alone: code that asks
        here whether a value is known gets it.
        """
        value = self._array()
        if isinstance(value, jax.core.Tracer):
            known = known_value(value)
            return value if known is None else known
        return value

    def _array(self) -> Array:
        """As `jax`, but whatever is traced is a tracer."""
        value = state.executor.read(self)
        if isinstance(value, np.ndarray):  # made by torch.empty, and nobody has written or read it
            from .convert import on_device

            value = on_device(value, self._m.index)
            if self._v is None and state.executor.owner is None:
                self._s.value = value
        return value

    def __jax_array__(self) -> Array:
        return self._array()

    def apply_jax(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``fn(array, ...)`` with arrays wrapped as tensors again."""
        return jax.tree.map(lambda x: Tensor(x) if isinstance(x, jax.Array) else x, fn(self._array(), *args, **kwargs))

    def apply_jax_(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Replace the value by ``fn(array, ...)``, which keeps shape and dtype."""
        value = fn(self._array(), *args, **kwargs)
        if tuple(value.shape) != self._m.shape or value.dtype != self._m.jax_dtype:
            raise ValueError(
                f"apply_jax_ must keep shape and dtype {self._m.jax_dtype}{list(self._m.shape)}; "
                f"the function gave {value.dtype}{list(value.shape)}"
            )
        state.executor.write(self, value)
        return self

    def shard_(self, sharding: Any) -> Tensor:
        """Lay the value out over devices as the `jax.sharding.Sharding` says, in place, now and after every write.

        Raises:
            ValueError: the sharding does not divide a dimension, or this is not a tensor on the first device (sharded
                tensors are on ``jax:0``, whatever devices they lie on).
        """
        if self._m.index and len(sharding.device_set) > 1:
            raise ValueError(
                f"shard_ was called on a tensor on {self.device}; tensors that lie on several devices are on jax:0: "
                'move it first with .to("jax:0")'
            )
        if self._v is not None or state.executor.owner is not None:
            return self.apply_jax_(place, sharding)
        value = place(state.executor.read(self), sharding)
        if sharding != self._s.sharding:
            self._s.sharding = sharding
            pins.epoch += 1
        state.executor.write(self, value)
        return self

    # the words of torch.distributed.tensor, see torchax.interop.distribute_tensor
    @property
    def placements(self) -> Any:
        """`Shard` and `Replicate`, one for each dimension of the mesh; an AttributeError for a tensor on one device."""
        from . import interop

        return interop.placements_of(self)

    @property
    def device_mesh(self) -> Any:
        """The mesh as torch's `DeviceMesh`; an AttributeError for a tensor on one device."""
        from . import interop

        return interop.device_mesh_of(self)

    def full_tensor(self) -> TorchTensor:
        """The whole tensor on each of its devices."""
        from . import interop

        return interop.full_tensor(self)

    def redistribute(self, device_mesh: Any = None, placements: Any = None) -> TorchTensor:
        """The same values with other placements."""
        from . import interop

        return interop.redistribute(self, device_mesh, placements)

    @property
    def jax_device(self) -> Any:
        """The JAX device, or the sharding where there are several."""
        return getattr(self.jax(), "device", None)

    def block_until_ready(self) -> Tensor:
        """Wait until the value has been computed.

        Raises:
            Exception: what an op of this thread found wrong with values, an index out of range say.
        """
        jax.block_until_ready(self.jax())
        settle()
        return self

    # ------------------------------------------------------------------ what C++ refuses to a subclass
    @property
    def device(self) -> Device:  # type: ignore[override]
        return self._m.device

    @property
    def is_jax(self) -> bool:
        """True for every tensor on device ``jax``."""
        return True

    @property
    def is_lazy(self) -> bool:
        return False

    def get_device(self) -> int:
        return self._m.index

    @property
    def data(self) -> TorchTensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: TorchTensor) -> None:  # C++ would change the metadata and leave the payload behind
        if not isinstance(other, Tensor):
            raise RuntimeError(
                f"incompatible tensor type: .data of a tensor on {self.device} was assigned a tensor on {other.device}; "
                'move it first with .to("jax")'
            )
        become(self, other)

    def to(self, *args: Any, **kwargs: Any) -> TorchTensor:
        """As `torch.Tensor.to`; the tensor itself where nothing changes, which C++ cannot see: there, its device is another."""
        target = args[0] if args else kwargs.get("device")
        if isinstance(target, str | int | Device) and not isinstance(target, bool):
            device = Device(target)
            if device.type == "jax":
                if device.index is None:
                    from .device import with_index

                    device = with_index(device)
                if device.index == self._m.index:
                    device = self._m.cpp_device
                if args:
                    args = (device, *args[1:])
                else:
                    kwargs["device"] = device
        return torch.Tensor.to(self, *args, **kwargs)

    def set_(self, source: Any = None, storage_offset: int = 0, size: Any = None, stride: Any = None) -> TorchTensor:
        if not isinstance(source, StorageView):
            if source is None:
                return torch.Tensor.set_(self)  # pyright: ignore[reportCallIssue]
            if size is None:
                return torch.Tensor.set_(self, source)
            return torch.Tensor.set_(self, source, storage_offset, size, stride or ())
        from ._loading import tensor_on_storage

        become(self, tensor_on_storage(self, source, storage_offset, size, stride))
        torch.autograd.graph.increment_version(self)
        return self

    def cpu(self, memory_format: Any = torch.preserve_format) -> TorchTensor:
        return self.to(torch.device("cpu"), memory_format=memory_format)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        if self.requires_grad and not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.detach().cpu().numpy(force=force)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def __dlpack__(self, **kwargs: Any) -> Any:
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        return self.jax().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self.jax().__dlpack_device__()  # pyright: ignore[reportAttributeAccessIssue]

    def data_ptr(self) -> int:
        """A number that tells apart what does not share memory, as torch's does; nothing lies at that address."""
        if not self._m.numel:
            return 0
        return self._s.address + self.storage_offset() * self._m.jax_dtype.itemsize

    def untyped_storage(self) -> Any:
        return StorageView(self._s, self._m.device)

    def storage(self) -> Any:
        return self.untyped_storage()

    def is_shared(self) -> bool:
        return False

    def share_memory_(self) -> Tensor:
        raise RuntimeError("a tensor on device 'jax' cannot be shared between processes; share .cpu() instead")

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def pin_memory(self, device: Any = None) -> TorchTensor:
        raise RuntimeError("cannot pin a tensor on device 'jax': only dense CPU tensors can be pinned")

    # ------------------------------------------------------------------ copies, pickles, print
    def __copy__(self) -> Tensor:
        from ._serialize import shallow_copy

        return shallow_copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        from ._serialize import deepcopy

        return deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        from ._serialize import reduce

        return reduce(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        from ._repr import tensor_repr

        return tensor_repr(self)

    __str__ = __repr__

    def torch(self) -> TorchTensor:
        """A copy on CPU."""
        return self.cpu()


def make(storage: Storage, meta: TensorMeta, view: View | None = None) -> Tensor:
    """A tensor over `storage`; the fast way, without checks."""
    t = _make_subclass(
        Tensor, meta.shape, meta.strides, 0 if view is None else view.offset, None, meta.dtype, _strided, meta.cpp_device,
        False, False, None, False, False, _KEYS,
    )  # fmt: skip
    t._s = storage
    t._m = meta
    if view is not None:
        t._v = view
    return t


def wrap(value: Any, meta: TensorMeta) -> Tensor:
    """A tensor with a storage of its own for `value`, which must fit `meta`."""
    owner = state.executor.owner
    storage = Storage(value, meta)
    if owner is not None:
        storage.owner = owner
        owner.bear(storage)
    return make(storage, meta)


def __getattr__(name: str) -> Any:
    if name in ("j2t", "j2t_dtype", "t2j", "t2j_dtype"):  # which existing users import from here
        from .ops import mappings

        return getattr(mappings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def become(t: Tensor, other: Tensor) -> None:
    """Give `t` the storage, view and metadata of `other`. Version, graph and Python object of `t` stay."""
    shell = make(other._s, other._m, other._v)
    with torch._C._DisableTorchDispatch():
        torch.Tensor.data.__set__(t, shell)  # type: ignore[attr-defined]
    leave(t)
    t._s, t._m, t._v, t._cache = other._s, other._m, other._v, None


def _index_of(array: Any) -> int:
    if isinstance(array, jax.core.Tracer):
        return 0
    devices = array.devices()
    if len(devices) != 1:
        return 0  # sharded: one logical device
    try:
        return jax.local_devices().index(next(iter(devices)))
    except ValueError:
        raise errors.PlatformUnavailable(
            f"the array lies on {next(iter(devices))}, which is not a device of JAX's default platform "
            f"({jax.default_backend()}: {jax.local_devices()}); move it with jax.device_put first"
        ) from None
