"""Ops that nobody lowers: an error that says what to do, or, where the user allows it, CPU torch."""

from __future__ import annotations

import collections
import warnings
from typing import Any

import torch
from torch.utils._pytree import tree_map

from . import convert, errors, plugins
from ._registry import REGISTRY
from ._storage import meta_of
from ._views import strided_view
from .config import config
from .tensor import Tensor, make

SERVED: collections.Counter[str] = collections.Counter()  # by op: how often CPU torch stood in
_warned: set[str] = set()


def missing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Raise `OperatorNotFound`, or run the op on CPU if ``torchax.config.fallback == "cpu"``."""
    if config.fallback != "cpu":
        raise not_found(func)
    name = func.name()
    SERVED[name] += 1
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} has no lowering and runs on CPU (torchax.config.fallback = 'cpu')", RuntimeWarning, stacklevel=3
        )
    return on_cpu(func, args, kwargs)


def not_found(func: Any) -> errors.OperatorNotFound:
    """The error for an op that no plugin lowers."""
    loaded = [p.name for p in plugins.status() if p.state == "loaded"]
    absent = [f"{p.name} ({p.state}: {p.reason})" for p in plugins.status() if p.state != "loaded"]
    near = REGISTRY.nearest(func)
    text = f"{func.name()} has no lowering for device 'jax'. Schema: {func._schema}. Plugins searched: {', '.join(loaded) or 'none'}"
    if absent:
        text += f"; not searched: {', '.join(absent)}"
    if near:
        text += f". Nearest registered: {', '.join(near)}"
    text += (
        ". What to do: write a lowering (from torchax.ops import lowering; see docs/ops-registry.md), "
        + ("" if loaded else "install the ops of PyTorch (pip install torchax-ops-aten), ")
        + "or allow the slow CPU fallback: torchax.config.fallback = 'cpu'"
    )
    return errors.OperatorNotFound(text)


def on_cpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op on CPU copies; what it wrote is written back, views of its operands stay views."""
    copies: dict[int, tuple[Tensor, torch.Tensor, int]] = {}
    index = 0

    def to_cpu(x: Any) -> Any:
        nonlocal index
        if type(x) is Tensor:
            index = x._m.index
            if id(x) not in copies:
                host = _strided_copy(x)
                copies[id(x)] = (x, host, host._version)
            return copies[id(x)][1]
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == "jax" else x

    cargs, ckwargs = tree_map(to_cpu, args), tree_map(to_cpu, kwargs)
    out = func(*cargs, **ckwargs)
    for t, host, version in copies.values():
        if host._version != version:
            torch.ops.aten.copy_.default(t, host)
    owners = {id(host): t for t, host, _ in copies.values()}
    storages = {host.untyped_storage()._cdata: t for t, host, _ in copies.values()}

    def back(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in owners:
            return owners[id(x)]
        base = storages.get(x.untyped_storage()._cdata)
        if base is not None:  # a view
            meta = meta_of(tuple(x.shape), tuple(x.stride()), x.dtype, index)
            begin = base.storage_offset() * base.dtype.itemsize // x.dtype.itemsize
            return make(base._s, meta, strided_view(base._s.geometry, meta, begin + int(x.storage_offset())))
        return convert.from_cpu(x, index)

    return tree_map(back, out)


def _strided_copy(t: Tensor) -> torch.Tensor:
    host = convert.to_cpu(t, "the CPU fallback")
    return (
        host
        if tuple(host.stride()) == t._m.strides
        else torch.empty_strided(t._m.shape, t._m.strides, dtype=t.dtype).copy_(host)
    )
