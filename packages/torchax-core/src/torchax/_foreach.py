"""``_foreach_op(lists)`` from the op's own lowering: all elements in one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_OVERLOADS = {
    "List": ("Tensor", "default", "Tensor_Tensor"),
    "Scalar": ("Tensor_Scalar", "Scalar", "Tensor", "default"),
    "ScalarList": ("Tensor_Scalar", "Scalar", "Tensor", "default"),
    "Tensor": ("Tensor", "default"),
    "": ("default",),
}


def foreach_element(func: Any) -> Any | None:
    """The op that a ``_foreach_`` op applies to every element, or None."""
    name = func._schema.name
    if not name.startswith("aten::_foreach_"):
        return None
    packet = getattr(torch.ops.aten, name.removeprefix("aten::_foreach_"), None)
    if packet is None:
        return None
    for overload in _OVERLOADS.get(func._schema.overload_name, ()):
        if overload in packet.overloads():
            return getattr(packet, overload)
    return None


def foreach_apply(
    func: Any, element: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rules: Any
) -> Callable[..., Any]:
    """A function of (args, kwargs) with arrays in place of tensors that gives the list of results."""
    listed = {a.name for a in func._schema.arguments if str(a.type).startswith("List[")}
    names = [a.name for a in func._schema.arguments if not a.kwarg_only]
    targets = element._schema.arguments
    count = len(args[0])

    def call(args: tuple[Any, ...], kwargs: dict[str, Any], i: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        picked, keywords = [], {}
        for name, value, target in zip(names, args, targets, strict=False):
            value = value[i] if name in listed else value
            if target.kwarg_only:
                keywords[target.name] = value
            else:
                picked.append(value)
        for name, value in kwargs.items():
            keywords[name] = value[i] if name in listed else value
        return tuple(picked), keywords

    rule = rules[element]
    applies = [rule.resolve(*call(args, kwargs, i)).apply for i in range(count)]

    def apply(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return [applies[i](*call(args, kwargs, i)) for i in range(count)]

    return apply
