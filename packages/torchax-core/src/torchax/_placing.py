"""Which device a call computes on; calls that mix devices are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from . import _core_ops
from .tensor import Tensor


def device_index(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The device of a call; refuses mixed ones, in torch's words."""
    found, host = None, None
    for x in tree_flatten((args, kwargs))[0]:
        if type(x) is Tensor:
            if found is None:
                found = x._m.index
            elif found != x._m.index and x._m.shape:
                raise mixed_devices(f"jax:{found}", f"jax:{x._m.index}", func)
        elif isinstance(x, torch.Tensor) and x.dim() and not _takes_host(func, x):
            host = x.device
    if host is not None:
        raise mixed_devices(f"jax:{found or 0}", str(host), func)
    device = kwargs.get("device")
    return _core_ops.current_index(device) if found is None or device is not None else found


_INDEXING = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
    "aten::_unsafe_index_put",
}


def _takes_host(func: Any, x: torch.Tensor) -> bool:
    """Whether the op takes `x` on CPU beside tensors on the device: indices, and the batch sizes of packed sequences."""
    schema = func._schema
    return schema.name in _INDEXING or (
        x.dtype is torch.int64 and any(a.name == "batch_sizes" for a in schema.arguments)
    )


def mixed_devices(a: str, b: str, func: Any) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {a} and {b}! "
        f"(when calling {func}; move one of them with .to(...))"
    )
