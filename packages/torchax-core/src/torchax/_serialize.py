"""Deep copies and pickles. Tensors that share a storage still share one afterwards, as on CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._utils import _get_restore_location

from . import convert
from ._loading import forgetting_location
from ._storage import Storage
from .tensor import OWN, Tensor, make


def deepcopy(t: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy` of a leaf tensor; gradients and attributes come along."""
    if id(t) in memo:
        return memo[id(t)]
    if not t.is_leaf:
        raise RuntimeError(
            "Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the moment.  "
            "If you were attempting to deepcopy a module, this may be because of a torch.nn.utils.weight_norm usage, "
            "see https://github.com/pytorch/pytorch/pull/103001"
        )
    with torch.no_grad():
        key = id(t._s)
        if key not in memo:
            memo[key] = Storage(convert.copied(t._s.value), t._s.geometry)
            memo[key].sharding = t._s.sharding
        twin = make(memo[key], t._m, t._v)
    return _finish(twin, t, memo)


def shallow_copy(t: Tensor) -> Tensor:
    """`copy.copy`: another tensor on the same storage, with the same attributes."""
    twin = make(t._s, t._m, t._v)
    if isinstance(t, torch.nn.Parameter):
        twin = torch.nn.Parameter(twin, t.requires_grad)
    else:
        twin.requires_grad_(t.requires_grad)
    vars(twin).update({k: v for k, v in vars(t).items() if k not in OWN})
    return twin  # type: ignore[return-value]


def _finish(twin: Tensor, t: Tensor, memo: dict[int, Any]) -> Tensor:
    memo[id(t)] = twin
    twin.requires_grad_(t.requires_grad)
    if isinstance(t, torch.nn.Parameter):
        twin._is_param = True  # type: ignore[attr-defined]
    if t.grad is not None:
        twin.grad = copy.deepcopy(t.grad, memo)
    for name, value in vars(t).items():
        if name not in OWN:
            vars(twin)[name] = copy.deepcopy(value, memo)
    return twin


def reduce(t: Tensor) -> Any:
    """`Tensor.__reduce_ex__`: the storage's values as a CPU tensor (its own storage is shared by all who share ours)."""
    if isinstance(t, torch.nn.Parameter):
        kind = "Parameter"
    else:
        kind = "Tensor"
    host = convert.host_storage(t._s)
    shaped = torch.empty(0, dtype=t.dtype)
    shaped.set_(host.untyped_storage(), t.storage_offset(), t._m.shape, t._m.strides)  # type: ignore[call-overload]
    extra = {k: v for k, v in vars(t).items() if k not in OWN}
    return rebuild, (shaped, str(t.device), t.requires_grad, kind, extra)


def rebuild(values: torch.Tensor, device: str, requires_grad: bool, kind: str, extra: dict[str, Any]) -> torch.Tensor:
    """What a pickled tensor becomes: on its device, or where ``torch.load(map_location=...)`` says."""
    with forgetting_location():
        result = convert.restore(values, torch.device(_location(device, values)))
    if kind == "Parameter":
        result = torch.nn.Parameter(result, requires_grad)
    else:
        result.requires_grad_(requires_grad)
    vars(result).update(extra)
    return result


def _location(device: str, values: torch.Tensor) -> Any:
    map_location = torch.serialization._serialization_tls.map_location
    if not callable(map_location):
        return _get_restore_location(device)
    storage = map_location(values.untyped_storage(), device)  # pyright: ignore[reportArgumentType] # as torch asks it for storages
    return device if storage is None else storage.device


torch.serialization.add_safe_globals([rebuild])
