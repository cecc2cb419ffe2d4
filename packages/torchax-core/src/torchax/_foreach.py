"""``_foreach_op(lists)`` from the op's own lowering: all elements in one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
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
    applies: list[Callable[..., Any]] = []
    known: dict[Any, Callable[..., Any]] = {}
    for i in range(count):
        one = call(args, kwargs, i)
        signature = rule.bind(*one)[0]
        if signature not in known:
            known[signature] = _traced_once(rule.resolve(*one).apply)
        applies.append(known[signature])

    def apply(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return [applies[i](*call(args, kwargs, i)) for i in range(count)]

    return apply


def _traced_once(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The same; of hundreds of elements of one signature, JAX traces one and copies what it found."""

    def on_arrays(nest: Any, rest: tuple[Any, ...], arrays: list[Any]) -> Any:
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(nest, [next(given) if x is None else x[1] for x in rest])
        return apply(args, kwargs)

    inlined = jax.jit(on_arrays, static_argnums=(0, 1), inline=True)

    def call(*call: Any) -> Any:
        leaves, nest = jax.tree.flatten(call)
        # with their types, since 1 equals 1.0 and True; None stands for an array
        rest = tuple(None if isinstance(x, jax.Array) else (type(x), x) for x in leaves)
        return inlined(nest, rest, [x for x in leaves if isinstance(x, jax.Array)])

    return call
