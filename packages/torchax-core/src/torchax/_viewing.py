"""Rules of view ops: another chain on the same storage, no JAX call until the value is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._dispatch import RULES
from ._infer import NoMeta, describe, run_on_meta
from ._missing import missing
from ._registry import Lowering
from ._storage import extent, meta_of
from ._twins import functional_twin
from ._views import View, intern_step, root, strided_view
from .tensor import Tensor, become, make

Rule = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def view_rule(func: Any, entry: Lowering) -> Rule:
    """The rule of an op that gives one alias of its first argument."""
    name, read, inverse, prepare = func.name(), entry.fn, entry.inverse, entry.prepare
    cache: dict[Any, Any] = {}  # (metadata, static arguments) -> metadata of the view, step, offset
    defaults = _defaults(func)

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        t = args[0]
        rest = args[1:]
        if kwargs or len(rest) < len(defaults):
            rest = _complete(rest, kwargs, defaults)
        meta = t._m
        prepared = None if prepare is None else prepare(meta.shape, meta.strides, *rest)
        if prepared is None:
            static, positions, delta = tuple([tuple(a) if type(a) is list else a for a in rest]), (), None
        else:
            static, positions, delta = prepared
        hit = cache.get((meta, static))
        if hit is None or (
            prepared is None and prepare is not None
        ):  # unprepared arguments are wrong: let torch say so
            m = run_on_meta(func, (t, *rest), {})
            out = describe(m, meta.index)
            identity = prepared is not None and out is meta and not positions
            step = None if identity else intern_step(name, read, inverse, static, len(positions))
            hit = cache[(meta, static)] = (out, step, m.storage_offset())
        out, step, offset = hit
        view = t._v
        if step is None:
            return make(t._s, out, view)
        if delta is None:
            delta = offset
        if view is None:
            return make(t._s, out, View(root(t._s.geometry).then(step), positions, delta))
        begin = view.offset if out.dtype is meta.dtype else view.offset * meta.dtype.itemsize // out.dtype.itemsize
        return make(t._s, out, View(view.chain.then(step), view.positions + positions, begin + delta))

    return rule


def views_rule(func: Any, entry: Lowering) -> Rule:
    """The rule of an op that gives several aliases: its lowering lists them as calls of single views."""
    defaults = _defaults(func)

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        t, rest = args[0], _complete(args[1:], kwargs, defaults)
        calls = entry.fn(t._m.shape, *rest)
        if calls is None:  # bad arguments: torch says what is wrong
            run_on_meta(func, args, kwargs)
            raise RuntimeError(f"{func} refused {rest} for a tensor of shape {list(t._m.shape)}")
        return [RULES[op]((t, *a), {}) for op, *a in calls]

    return rule


def strided_view_rule(func: Any) -> Rule:
    """A view op that no plugin lowers: its metadata says which strided window of the storage it is."""

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        t = next(a for a in args if type(a) is Tensor)
        try:
            out = run_on_meta(func, args, kwargs)
        except NoMeta:
            return missing(func, args, kwargs)
        if isinstance(out, torch.Tensor):
            return _window(t, out, t.storage_offset() + int(out.storage_offset()))
        return [_window(t, m, t.storage_offset() + m.storage_offset()) for m in out]

    return rule


def as_strided(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``as_strided`` counts from the storage's beginning, whatever view it is called on."""
    t, rest = args[0], args[1:]
    op = torch.ops.aten.as_strided.default
    reach = t.storage_offset() + max(extent(t._m.shape, t._m.strides), 1)
    whole = torch.empty(max(t._s.geometry.numel, reach), dtype=t.dtype, device="meta")
    m = op(whole.as_strided(t._m.shape, t._m.strides, t.storage_offset()), *rest, **kwargs)
    size = m.dtype.itemsize
    need = (m.storage_offset() + extent(m.shape, m.stride())) * size
    if m.numel() and need > t._s.nbytes:
        raise RuntimeError(
            f"setStorage: sizes {list(m.shape)}, strides {list(m.stride())}, storage offset {m.storage_offset()}, and itemsize {size} "
            f"requiring a storage size of {need} are out of bounds for storage of size {t._s.nbytes}"
        )
    return _window(t, m, m.storage_offset())


def _window(t: Tensor, m: torch.Tensor, offset: int) -> Tensor:
    shape, strides = tuple(m.shape), tuple(m.stride())
    meta = meta_of(shape, strides, m.dtype, t._m.index)
    window = make(t._s, meta, strided_view(t._s.geometry, meta, offset))
    steps = [step.name for step in t._v.chain.steps] if t._v is not None else []
    for name, op in _MARKS.items():  # conjugated and negated views stay so
        if steps.count(name) % 2 and (name != "aten::_conj" or m.is_complex()):
            window = RULES[op]((window,), {})
    return window


_MARKS = {"aten::_conj": torch.ops.aten._conj.default, "aten::_neg_view": torch.ops.aten._neg_view.default}


def inplace_view_rule(func: Any) -> Rule:
    """``squeeze_``, ``t_``, ``transpose_``, ...: the tensor becomes another view of its storage."""
    twin = functional_twin(func)

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        become(args[0], RULES[twin](args, kwargs))
        return args[0]

    return rule


def _defaults(func: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value) for a in func._schema.arguments[1:] if not a.kwarg_only)


def _complete(rest: tuple[Any, ...], kwargs: dict[str, Any], defaults: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
    return rest + tuple([kwargs.get(name, default) for name, default in defaults[len(rest) :]])
