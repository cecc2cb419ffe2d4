"""Rules of view ops: another chain on the same storage, no JAX call until the value is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._dispatch import RULES
from ._infer import infer
from ._registry import REGISTRY, Lowering
from ._storage import TensorMeta, meta_of
from ._twins import functional_twin
from ._views import View, intern_step, root, strided_view
from .tensor import Tensor, become, make

Rule = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def view_rule(func: Any, entry: Lowering) -> Rule:
    """The rule of an op that gives one alias of its first argument."""
    name, read, inverse, prepare = func.name(), entry.fn, entry.inverse, entry.prepare
    cache: dict[Any, Any] = {}
    defaults = _defaults(func)

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        t = args[0]
        rest = args[1:]
        if kwargs or len(rest) < len(defaults):
            rest = _complete(rest, kwargs, defaults)
        meta = t._m
        prepared = prepare(meta.shape, meta.strides, *rest) if prepare is not None else None
        if prepared is None:
            static, positions, delta = tuple([tuple(a) if type(a) is list else a for a in rest]), (), None
        else:
            static, positions, delta = prepared
        key = (meta, static)
        hit = cache.get(key)
        if hit is None or (prepared is None and prepare is not None):
            out, offset = view_meta(func, t, rest)
            identity = out is meta and not positions and prepare is not None and prepared is not None
            hit = cache[key] = (out, None if identity else intern_step(name, read, inverse, static, len(positions)), offset)
        out, step, offset = hit
        view = t._v
        if step is None:
            return make(t._s, out, view)
        if delta is None:
            delta = offset
        if view is None:
            return make(t._s, out, View(root(t._s.geometry).then(step), positions, delta))
        return make(t._s, out, View(view.chain.then(step), view.positions + positions, view.offset + delta))

    return rule


def view_meta(func: Any, t: Tensor, rest: tuple[Any, ...]) -> tuple[TensorMeta, int]:
    """Metadata of a view, and what it adds to the storage offset."""
    import torch

    offset = 0
    out: Any = None

    def keep(*args: Any, **kwargs: Any) -> Any:
        nonlocal out
        out = func(*args, **kwargs)
        return out

    keep._schema = func._schema  # type: ignore[attr-defined]
    meta = infer(keep, (t, *rest), {}, t._m.index)
    if isinstance(out, torch.Tensor):
        offset = out.storage_offset()
    return meta, offset


def views_rule(func: Any, entry: Lowering) -> Rule:
    """The rule of an op that gives several aliases: its lowering lists them as calls of single views."""
    import torch

    defaults = _defaults(func)

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        t = args[0]
        rest = _complete(args[1:], kwargs, defaults) if kwargs or len(args) <= len(defaults) else args[1:]
        calls = entry.fn(t._m.shape, *rest)
        if calls is None:  # bad arguments: torch says what is wrong
            infer(func, args, kwargs, t._m.index)
            raise RuntimeError(f"{func} refused {rest}")
        return [RULES[op]((t, *a), {}) for op, *a in calls]

    _ = torch
    return rule


def strided_view_rule(func: Any) -> Rule:
    """A view op that no plugin lowers: its metadata says which strided window of the storage it is."""

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        import torch

        t = next(a for a in args if type(a) is Tensor)
        base = t.storage_offset()
        outs: list[torch.Tensor] = []

        def keep(*a: Any, **k: Any) -> Any:
            out = func(*a, **k)
            outs.extend(out if isinstance(out, list | tuple) else [out])
            return out

        keep._schema = func._schema  # type: ignore[attr-defined]
        metas = infer(keep, args, kwargs, t._m.index)
        listed = metas if isinstance(metas, list | tuple) else [metas]
        made = [
            make(t._s, m, strided_view(t._s.geometry, m.shape, m.strides, base + o.storage_offset()))
            for m, o in zip(listed, outs, strict=True)
        ]
        return made if isinstance(metas, list | tuple) else made[0]

    return rule


def as_strided(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``as_strided`` counts from the storage's beginning, whatever view it is called on."""
    import torch

    t = args[0]
    out: Any = None

    def keep(x: Any, *a: Any, **k: Any) -> Any:
        nonlocal out
        need = t.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(t._m.shape, t._m.strides, strict=True) if n)
        whole = torch.empty(max(t._s.geometry.numel, need), dtype=t.dtype, device="meta")
        out = torch.ops.aten.as_strided.default(whole.as_strided(t._m.shape, t._m.strides, t.storage_offset()), *a, **k)
        return out

    keep._schema = torch.ops.aten.as_strided.default._schema  # type: ignore[attr-defined]
    meta = infer(keep, args, kwargs, t._m.index)
    return make(t._s, meta, strided_view(t._s.geometry, meta.shape, meta.strides, out.storage_offset()))


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
    return rest + tuple(kwargs.get(name, default) for name, default in defaults[len(rest) :])


__all__ = ["REGISTRY", "as_strided", "inplace_view_rule", "meta_of", "strided_view_rule", "view_rule", "views_rule"]
