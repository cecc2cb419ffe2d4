"""The kinds of rule: how an op is carried out on tensors, given who lowers it.

functional (`_functional`): values in, values out. mutating (`_mutating`): in-place and ``out=`` forms, derived from
the functional op through the schema's alias annotations. view and in-place view (`_viewing`): another `_views.Chain`
on the same storage. prepared (`_prepared`): factories. composite and missing (`_lower`, `_missing`): taken apart, or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import _core_ops, convert
from ._contract import fault
from ._dispatch import RULES
from ._execute import executing, state
from ._execute.strict import Placed
from ._functional import FunctionalRule, ProductRule, as_shapes
from ._lower import composite_rule, is_composite_implicit
from ._marks import ACCUMULATING, accumulating, marks, writing
from ._mutating import mutating_rule
from ._prepared import prepared_rule
from ._registry import REGISTRY, Lowering
from ._sharding import place
from ._viewing import inplace_view_rule, strided_view_rule, view_rule, views_rule
from .errors import PluginError
from .tensor import Tensor

Rule = Callable[[tuple[Any, ...], dict[str, Any]], Any]
REGISTRY.listeners.append(RULES.clear)


def make_rule(func: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """The rule for an op; made once, when it is first called."""
    rule = _own_rule(func)
    name = func._schema.name
    if func.name() in ACCUMULATING and not isinstance(rule, FunctionalRule):
        rule = accumulating(rule)
    if func._schema.is_mutable:
        rule = writing(rule)
    return following(rule) if name.endswith("_like") or name in ("aten::clone", "aten::_to_copy") else rule


def _own_rule(func: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    core = _core_ops.RULES.get(func.name())
    if core is not None:
        return core
    entries = REGISTRY.lowerings(func)
    if func.name() in REGISTRY.undefined:
        _look_at(entries, func)
    kinds = {entry.kind for entry in entries}
    if "view" in kinds:
        return _chosen(func, entries, view_rule)
    if "views" in kinds:
        return _chosen(func, entries, views_rule)
    if entries and entries[0].prepare is not None:
        return prepared_rule(func, entries[0])
    if "stateful" in kinds and func._schema.is_mutable:
        return FunctionalRule(func)
    if torch.Tag.inplace_view in func.tags and func._schema.name.endswith("_"):
        return inplace_view_rule(func)
    if func._schema.is_mutable:
        return mutating_rule(func)
    if not entries and is_composite_implicit(func):
        return composite_rule(func)
    if not entries and not any("Tensor" in str(r.type) for r in func._schema.returns):  # it asks for values (allclose)
        return composite_rule(func)
    if not entries and _returns_alias(func):
        return strided_view_rule(func)
    kind = (
        ProductRule
        if any(e.products for e in entries)
        else _Accumulating
        if func.name() in ACCUMULATING
        else FunctionalRule
    )
    rule = kind(func)
    names = [a.name for a in func._schema.arguments if not a.kwarg_only]
    if "generator" in names:  # poisson(x, generator)
        at = names.index("generator")
        return lambda args, kwargs: rule(
            args[:at] + args[at + 1 :], {**kwargs, "generator": args[at]} if len(args) > at else kwargs
        )
    return rule


def _look_at(entries: list[Lowering], func: Any) -> None:
    for entry in entries:
        if wrong := fault(entry, func._schema):
            raise PluginError(
                f"plugin {entry.provider!r} breaks the contract: {wrong}; switch it off with TORCHAX_PLUGINS=-{entry.provider}"
            )


class _Accumulating(FunctionalRule):
    """A functional op by which the engine makes a gradient."""

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        marks.grads = object()
        return super().__call__(args, kwargs)


def _chosen(func: Any, entries: list[Lowering], kind: Callable[[Any, Lowering], Rule]) -> Rule:
    """The view rule of the lowering that serves a call. Where there is no choice, nothing is looked at."""
    if len(entries) == 1 and entries[0].conditions == "always":
        return kind(func, entries[0])
    rules = {id(entry): kind(func, entry) for entry in entries}
    otherwise = strided_view_rule(func)

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        meta = args[0]._m
        entry = REGISTRY.resolve(func, convert.platform(meta.index), meta.dtype, as_shapes(args, kwargs))
        return (otherwise if entry is None else rules[id(entry)])(args, kwargs)

    return rule


def following(rule: Rule) -> Rule:
    """The rule of an op whose result lies where its first operand is pinned to lie (``zeros_like``, ``clone``)."""

    def follow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        t = args[0]
        if type(t) is not Tensor or (sharding := t._s.sharding) is None or t._v is not None:
            return rule(args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).index:
            return rule(args, kwargs)
        if state.executor.owner is None:
            with executing(Placed(t._m.shape, sharding)):
                result = rule(args, kwargs)
        else:
            result = rule(args, kwargs)
        if type(result) is Tensor and result._m.shape == t._m.shape and result._v is None and not result._m.index:
            result._s.sharding = sharding
            if isinstance(result._s.value, np.ndarray) or state.executor.owner is None:
                result._s.value = place(result._s.value, sharding)
        return result

    return follow


def _returns_alias(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns) and not func._schema.is_mutable
