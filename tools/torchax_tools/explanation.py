"""How a call of an operator is resolved, step by step, as `torchax._rules.make_rule` and the registry will do it."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import jax
import torch
import torchax._core_ops as core_ops
from torchax import dtypes
from torchax._foreach import foreach_element
from torchax._lower import decomposition, is_composite_implicit
from torchax._registry import REGISTRY
from torchax._twins import functional_twin
from torchax.errors import PluginError, UnsupportedDtype

from .coverage import KINDS, alternative, classify


class BadCall(ValueError):
    """The shapes or arguments do not fit the operator."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A call that may come: the platform, and what is known of the arguments."""

    platform: str
    dtype: torch.dtype | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()


def parse_shape(text: str) -> tuple[int, ...]:
    """``2x3`` or ``2,3``; ``scalar`` for no dimension.

    Raises:
        BadCall: it is neither.
    """
    if text in ("", "scalar", "()"):
        return ()
    try:
        shape = tuple(int(n) for n in text.replace("x", ",").strip("(),").split(","))
    except ValueError:
        raise BadCall(f"{text!r} is no shape: write 2x3, or scalar") from None
    if any(n < 0 for n in shape):
        raise BadCall(f"{text!r}: sizes are not negative")
    return shape


def parse_argument(text: str) -> tuple[str, Any]:
    """``name=value``; a value that is no Python literal is a string.

    Raises:
        BadCall: there is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise BadCall(f"{text!r}: write an argument as name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def call_of(func: Any, question: Question) -> tuple[tuple[Any, ...], dict[str, Any]] | str:
    """The arguments as predicates see them, or why there are none.

    Raises:
        BadCall: a shape too many, or an argument that the operator does not have.
    """
    given = dict(question.arguments)
    names = [a.name for a in func._schema.arguments]
    if unknown := set(given) - set(names):
        raise BadCall(f"{func} has no argument {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    if not question.shapes:
        return "no shapes are given (--shape)"
    shapes = list(question.shapes)
    try:
        dtype = dtypes.to_jax(question.dtype or torch.float32)
    except UnsupportedDtype as error:
        raise BadCall(str(error)) from None
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    lacking = []
    for a in func._schema.arguments:
        kind = str(a.type)
        if a.name in given:
            value = given[a.name]
        elif kind == "Tensor" or (kind == "Optional[Tensor]" and shapes):
            if not shapes:
                lacking.append(f"a shape for {a.name}")
                continue
            value = jax.ShapeDtypeStruct(shapes.pop(0), dtype)
        elif kind == "List[Tensor]":
            value, shapes = [jax.ShapeDtypeStruct(s, dtype) for s in shapes], []
        elif a.has_default_value():
            if a.kwarg_only:
                continue
            value = a.default_value
        else:
            lacking.append(f"--arg {a.name}=...")
            continue
        if a.kwarg_only:
            kwargs[a.name] = value
        else:
            args.append(value)
    if shapes:
        raise BadCall(f"{func}: {len(shapes)} shape(s) too many; schema: {func._schema}")
    return f"the call is not complete: give {', '.join(lacking)}" if lacking else (tuple(args), kwargs)


def explain(func: Any, question: Question) -> dict[str, Any]:
    """How a call of `func` is served: ``steps``, each with ``step`` and ``result``, the ``candidates``, and the outcome.

    Raises:
        BadCall: see `call_of`.
    """
    how = classify(func, question.platform, question.dtype)
    steps: list[dict[str, str]] = []
    candidates: list[dict[str, Any]] = []
    taken = _walk(func, question, steps, candidates)
    return {
        "op": how.op,
        "schema": str(func._schema),
        "platform": question.platform,
        "dtype": "" if question.dtype is None else str(question.dtype).removeprefix("torch."),
        "kind": how.kind,
        "provider": how.provider,
        "family": how.family,
        "core_aten": how.core_aten,
        "meaning": KINDS[how.kind],
        "steps": steps,
        "candidates": candidates,
        "served": taken,
    }


def _walk(func: Any, question: Question, steps: list[dict[str, str]], candidates: list[dict[str, Any]]) -> str:
    def step(what: str, result: str) -> None:
        steps.append({"op": func.name(), "step": what, "result": result})

    if func.name() in core_ops.RULES:
        step("does core do it itself?", "yes: storage, copies and geometry are torchax-core's")
        return "torchax-core"
    step("does core do it itself?", "no")
    entries = REGISTRY.lowerings(func)
    if entries:
        step("is it lowered?", f"yes, {len(entries)} lowering(s), asked by priority")
        try:
            taken = _ask(func, question, steps, candidates)
        except PluginError as error:  # a predicate raised, or a tie: so does the call
            step("resolution", f"an error: {error}")
            return ""
        if taken:
            return taken
    else:
        step("is it lowered?", "no plugin lowers it")
    if func._schema.is_mutable:
        twin = functional_twin(func)
        if twin is not None and "Tensor" in str(twin._schema):
            step("it writes its arguments: is there a functional form?", f"{twin.name()}; its result is written")
            return _walk(twin, question, steps, candidates)
        step("it writes its arguments: is there a functional form?", "no")
    if is_composite_implicit(func):
        step("does torch take it apart?", "yes, before any device sees it; its parts are resolved one by one")
        return "torch, by other operators"
    element = foreach_element(func)
    if element is not None:
        step("is it a list form?", f"yes, of {element.name()}, for each element in one program")
        return _walk(element, question, steps, candidates)
    way = decomposition(func)
    if way is not None:
        step("does torch have a decomposition?", f"yes ({way[0]}), traced into one program")
        return "torch, by a decomposition"
    step("does torch have a decomposition?", "no: OperatorNotFound; torchax.config.fallback = 'cpu' runs it on CPU")
    return ""


def _ask(func: Any, question: Question, steps: list[dict[str, str]], candidates: list[dict[str, Any]]) -> str:
    """The lowering that is taken, if one is; raises what a call would raise."""
    call = call_of(func, question)
    asked = any(entry.when is not None for entry in REGISTRY.lowerings(func))
    if isinstance(call, str) and asked:
        steps.append({"op": func.name(), "step": "predicates", "result": f"not asked, {call}; taken to hold"})
    known = None if isinstance(call, str) else call
    taken = ""
    for verdict in REGISTRY.explain(func, question.platform, question.dtype, known):
        entry = alternative(verdict.lowering)
        candidates.append({**entry, "taken": verdict.taken, "reason": verdict.reason})
        said = "taken" if verdict.taken else "passed over"
        where = f"{entry['plugin']}, priority {entry['priority']}: {entry['function']}"
        steps.append({"op": func.name(), "step": where, "result": f"{said}: {verdict.reason}"})
        if verdict.taken:
            taken = f"{entry['plugin']}: {entry['function']}"
    REGISTRY.resolve(func, question.platform, question.dtype, known)
    return taken
