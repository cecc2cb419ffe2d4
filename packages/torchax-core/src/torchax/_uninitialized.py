"""Parameters and buffers of lazy modules (``nn.LazyLinear``) on device ``jax``, whose shape the first input decides.

torch makes them from a tensor's C++ part, which is not all of a `Tensor`. So here a tensor of no elements gets the class of
an uninitialized one, and `materialize` gives it contents and its own class back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import parameter
from torch.nn.parameter import UninitializedTensorMixin, is_lazy  # pyright: ignore[reportAttributeAccessIssue]

from .tensor import Tensor, become, make


class _Uninitialized(UninitializedTensorMixin):
    """What both have in common, before torch's own class and `Tensor`."""

    cls_to_become = Tensor
    _torchs: type  # torch's class, to which this one belongs

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    @property
    def data(self: Any) -> Tensor:
        return make(self._s, self._m)

    @data.setter
    def data(self: Any, other: Tensor) -> None:
        kind = type(self)
        self.__class__ = Tensor
        try:
            become(self, other)
        finally:
            self.__class__ = kind

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return self._torchs, (self.requires_grad, self.device, self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__class__.__name__ == "method-wrapper":  # an attribute, which C++ knows
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func not in cls._allowed_methods:
            return super().__torch_function__(func, types, args, kwargs)  # raises, in torch's words
        return func(*(a.data if isinstance(a, _Uninitialized) else a for a in args), **kwargs)


class UninitializedParameter(_Uninitialized, parameter.UninitializedParameter, Tensor):  # type: ignore[misc]
    """`torch.nn.UninitializedParameter` on device ``jax``."""

    cls_to_become = Tensor
    _torchs = parameter.UninitializedParameter


class UninitializedBuffer(_Uninitialized, parameter.UninitializedBuffer, Tensor):  # type: ignore[misc]
    """`torch.nn.UninitializedBuffer` on device ``jax``."""

    cls_to_become = Tensor
    _torchs = parameter.UninitializedBuffer


def install() -> None:
    """Have torch's classes make ours where the device is ``jax``, once."""
    for ours, mark in ((UninitializedParameter, "_is_param"), (UninitializedBuffer, "_is_buffer")):
        ours._torchs.__new__ = _making(ours, mark, ours._torchs.__new__)


def _making(ours: type, mark: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
    def new(
        cls: type,
        requires_grad: bool = ours is UninitializedParameter,
        device: Any = None,
        dtype: Any = None,
        **rest: Any,
    ) -> torch.Tensor:
        data = torch.empty(0, device=device, dtype=dtype)
        if type(data) is not Tensor:
            kind = ours._torchs if cls is ours else cls  # type: ignore[attr-defined]
            return theirs(kind, requires_grad, device=data.device, dtype=data.dtype, **rest)
        data.requires_grad_(requires_grad)
        vars(data).update({mark: True, **({"persistent": True} if mark == "_is_buffer" else {}), **rest})
        data.__class__ = ours
        return data

    return new


def empty(t: torch.Tensor) -> torch.Tensor:
    """What an uninitialized tensor holds: no elements, of its device and dtype."""
    return torch.empty(0, device=t.device, dtype=t.dtype)


def moved(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What an uninitialized `old` is on the device and in the dtype of `new`, to which a module was moved."""
    if is_lazy(new) or new is old:
        return new
    kind = parameter.UninitializedParameter if isinstance(old, parameter.Parameter) else parameter.UninitializedBuffer
    return kind(old.requires_grad, device=new.device, dtype=new.dtype)  # type: ignore[return-value]
