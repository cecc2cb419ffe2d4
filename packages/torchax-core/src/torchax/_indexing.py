"""``x[i]`` and ``x[i] = value`` while tracing, where `i` is an integer tensor without dimensions.

torch takes its ``item()`` for the position of a select, which a traced value has not. So here the traced value is the
position: of a view, as on CPU, or where autograd watches, of `index` and `index_put_`, which it can differentiate.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.core
import numpy as np
import torch

from ._dispatch import RULES
from ._execute import state
from ._views import View
from .tensor import Tensor, make

aten = torch.ops.aten
_MASKS = (torch.bool, torch.uint8)
_getitem, _setitem = torch.Tensor.__getitem__, torch.Tensor.__setitem__


def install() -> None:
    """Give `Tensor` its indexing. The first trace does so: until then, indexing does not pass Python."""
    if Tensor.__getitem__ is not __getitem__:
        Tensor.__getitem__, Tensor.__setitem__ = __getitem__, __setitem__  # type: ignore[method-assign]


def __getitem__(self: Tensor, index: Any) -> torch.Tensor:
    if state.executor.owner is None:
        return _getitem(self, index)
    positions, rest = _positions(self, index)
    if not positions:
        return _getitem(self, index)
    selected = _indexed(self, positions) if _watched(self) else _view(self, positions)
    return _getitem(selected, rest)


def __setitem__(self: Tensor, index: Any, value: Any) -> None:
    if state.executor.owner is None:
        return _setitem(self, index, value)
    positions, rest = _positions(self, index)
    if not positions:
        return _setitem(self, index, value)
    if not _watched(self) and not _watched(value):
        return _setitem(_view(self, positions), rest, value)
    part = _indexed(self, positions)
    _setitem(part, rest, value)
    aten.index_put_.default(self, _indices(positions), part)
    return None


def _watched(x: Any) -> bool:
    return torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad


def _positions(x: Tensor, index: Any) -> tuple[dict[int, Tensor], tuple[Any, ...]]:
    """The traced positions in an index, by the dimension of `x` that each selects from, and the index without them."""
    parts = index if type(index) is tuple else (index,)
    traced = [_is_traced_position(p) for p in parts]
    if not any(traced):
        return {}, ()
    ellipsis = next((i for i, p in enumerate(parts) if p is Ellipsis), len(parts))
    before = [0, *itertools.accumulate(_consumed(p) for p in parts)]
    missing = x.dim() - before[-1]  # dimensions that the ellipsis stands for
    if missing < 0:
        raise IndexError(f"too many indices for tensor of dimension {x.dim()}")
    dims = [n + (missing if i > ellipsis else 0) for i, n in enumerate(before[:-1])]
    positions = {d: p for d, p, is_one in zip(dims, parts, traced, strict=True) if is_one}
    return positions, tuple(p for p, is_one in zip(parts, traced, strict=True) if not is_one)


def _is_traced_position(p: Any) -> bool:
    if type(p) is not Tensor or p._m.shape or p._m.jax_dtype.kind not in "iu" or p.dtype in _MASKS:
        return False
    return isinstance(state.executor.read(p), jax.core.Tracer)


def _consumed(p: Any) -> int:
    """How many dimensions a part of an index is about."""
    if p is None or p is Ellipsis or isinstance(p, bool):
        return 0
    if isinstance(p, torch.Tensor):
        return p.dim() if p.dtype in _MASKS else 1
    if isinstance(p, (list, tuple, np.ndarray)):
        mask = np.asarray(p)
        return mask.ndim if mask.dtype == bool else 1
    return 1


def _view(x: Tensor, positions: dict[int, Tensor]) -> Tensor:
    """A view of `x`, selected from the last dimension to the first."""
    for dim in sorted(positions, reverse=True):
        first = RULES[aten.select.int]((x, dim, 0), {})
        view = first._v
        position = jax.lax.convert_element_type(state.executor.read(positions[dim]), np.int32)
        x = make(first._s, first._m, View(view.chain, (*view.positions[:-1], position), view.offset))
    return x


def _indices(positions: dict[int, Tensor]) -> list[Any]:
    return [positions.get(dim) for dim in range(max(positions) + 1)]


def _indexed(x: Tensor, positions: dict[int, Tensor]) -> torch.Tensor:
    return aten.index.Tensor(x, _indices(positions))
