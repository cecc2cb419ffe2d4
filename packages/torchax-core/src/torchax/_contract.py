"""Whether a lowering can be what it says, and its functions take what they will be called with, by the operator's schema.

Plain functions are looked at when their plugin is loaded; that costs about 10 us for each. Others (`functools.partial`, callable
objects) are looked at by `torchax-ops doctor` alone, since `inspect` takes many times as long for them; functions of C, of which
nobody knows, not at all.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import jax
import torch

from ._registry import Kind, Lowering
from ._signature import DROPPED

_KINDS = get_args(Kind)
_FUNCTIONS = ("fn", "when", "inverse", "prepare", "backward", "grad")
_TUPLES = ("platforms", "dtypes", "static", "operands", "exact", "promote_only", "writes", "memory_format_of")
_JITTED: Any = type(jax.jit(lambda: None))


class Call(NamedTuple):
    """How a function is called: with `fewest` to `most` positional arguments, and with any of `keywords`.

    Attributes:
        most: how many positional arguments there are.
        fewest: how many always come; PyTorch leaves out what equals the defaults.
        keywords: names of keyword arguments, and whether they always come.
    """

    most: int
    fewest: int
    keywords: dict[str, bool]


class Parameters(NamedTuple):
    """What a function takes: names of positional arguments without defaults, how many there may be, and keywords."""

    required: tuple[str, ...]
    most: float
    named: frozenset[str]
    needed: frozenset[str]
    any_keyword: bool


def schema_of(op: str) -> Any | None:
    """The schema of an overload by its qualified name; None where it is not defined (yet)."""
    name, _, overload = op.partition(".")
    try:
        return torch._C._get_schema(name, overload)
    except RuntimeError:
        return None


def fault(entry: Lowering, schema: Any, thorough: bool = False) -> str | None:
    """What is wrong with the parameters of a lowering's functions, with file and line; None if nothing is found.

    Args:
        entry: the lowering.
        schema: of its operator.
        thorough: look also at what is no plain function.
    """
    if wrong := _misstated(entry):
        return f"{entry.op}: {wrong}"
    for what, fn, call in _calls(entry, schema):
        parameters = _parameters(fn, thorough)
        wrong = parameters and _misfit(parameters, call)
        if wrong:
            return f"{entry.op}: {what} {_place(fn)} {wrong}; the schema is {schema}"
    return None


def _misstated(entry: Lowering) -> str | None:
    """What a lowering says of itself that cannot be: it would never be taken, or fail when it is called."""
    values = vars(entry)  # of thousands, at every start: getattr takes several times as long
    for what in _FUNCTIONS:
        if (value := values[what]) is not None and not callable(value):
            return f"{what}={value!r} cannot be called"
    for what in _TUPLES:
        if type(value := values[what]) is str:
            return f"{what}={value!r} is a string: write a tuple, ({value!r},)"
    if entry.fn is None:
        return "fn=None: there is no function"
    if entry.kind not in _KINDS:
        return f"kind={entry.kind!r}: one of {', '.join(_KINDS)}"
    for name in entry.platforms:
        if name in ("cuda", "rocm"):
            return f"platforms has {name!r}: JAX calls it 'gpu'"
    for dtype in entry.dtypes:
        if not isinstance(dtype, torch.dtype):
            return f"dtypes has {dtype!r}: expected dtypes of torch, torch.float32 say"
    return None


def _calls(entry: Lowering, schema: Any) -> Iterator[tuple[str, Callable[..., Any], Call]]:
    """The functions of a lowering that are called with the arguments of the operator, and how."""
    if entry.prepare is not None:  # it says itself what the function is called with
        return
    most = fewest = 0
    keywords: dict[str, bool] = {}
    for a in schema.arguments:
        name = a.name
        if a.kwarg_only:
            if name not in DROPPED:
                keywords[name] = not a.has_default_value()
        elif name != "generator":
            most += 1
            fewest += not a.has_default_value()
    if entry.kind in ("view", "views"):
        yield "the lowering", entry.fn, Call(most, most, {})
        if entry.inverse is not None:
            yield "the inverse", entry.inverse, Call(most + 1, most + 1, {})
        return
    given = {"key": entry.random, "row_major": entry.layouts}
    yield "the lowering", entry.fn, Call(most, fewest, keywords | {k: True for k, holds in given.items() if holds})
    if entry.when is not None:
        yield "the predicate", entry.when, Call(most, fewest, keywords)


def _plain(fn: Any) -> Any:
    """The function behind `jax.jit`, which hands over its arguments as they come."""
    while type(fn) is _JITTED:
        fn = fn.__wrapped__
    return fn


def _parameters(fn: Any, thorough: bool) -> Parameters | None:
    fn = _plain(fn)
    if type(fn) is not types.FunctionType:
        return _inspected(fn) if thorough else None
    code = fn.__code__
    n, k = code.co_argcount, code.co_kwonlyargcount
    keyword_only = code.co_varnames[n : n + k]
    return Parameters(
        code.co_varnames[: n - len(fn.__defaults__ or ())],
        float("inf") if code.co_flags & inspect.CO_VARARGS else n,
        frozenset(code.co_varnames[code.co_posonlyargcount : n + k]),
        frozenset(keyword_only).difference(fn.__kwdefaults__ or ()),
        bool(code.co_flags & inspect.CO_VARKEYWORDS),
    )


def _inspected(fn: Any) -> Parameters | None:
    try:
        found = inspect.signature(fn, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = inspect.Parameter
    plain = [p for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    only = [p for p in found if p.kind is kinds.KEYWORD_ONLY]
    named = [p.name for p in plain if p.kind is kinds.POSITIONAL_OR_KEYWORD] + [p.name for p in only]
    return Parameters(
        tuple(p.name for p in plain if p.default is kinds.empty),
        float("inf") if any(p.kind is kinds.VAR_POSITIONAL for p in found) else len(plain),
        frozenset(named),
        frozenset(p.name for p in only if p.default is kinds.empty),
        any(p.kind is kinds.VAR_KEYWORD for p in found),
    )


def _misfit(p: Parameters, call: Call) -> str | None:
    if p.most < call.most:
        return f"takes {p.most} positional arguments, and up to {call.most} come"
    missed = [name for name in p.required[call.fewest :] if not call.keywords.get(name)]
    if missed:
        return f"needs {', '.join(missed)}, which does not always come: give it a default"
    unknown = [] if p.any_keyword else [name for name in call.keywords if name not in p.named]
    if unknown:
        return f"has no keyword {', '.join(unknown)}"
    missed = sorted(name for name in p.needed if not call.keywords.get(name))
    return f"needs the keyword {', '.join(missed)}, which does not always come: give it a default" if missed else None


def _place(fn: Any) -> str:
    fn = _plain(fn)
    code = getattr(fn, "__code__", None) or getattr(getattr(fn, "func", None), "__code__", None)
    name = getattr(fn, "__qualname__", None) or repr(fn)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name
