"""Which functions given to `flex_attention` are of a known form: capped scores, and keys in a band around the query.

They are recorded on CPU numbers and their graphs read: a form is known if every operation in it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


class Form(NamedTuple):
    """Scores times `factor`, then ``soft_cap * tanh(score / soft_cap)``; query i sees key j if ``-right <= i - j <= left``."""

    factor: float = 1.0
    soft_cap: float | None = None
    left: int | None = None
    right: int | None = None


class _Unknown(Exception):
    """Something in a function is of no known form."""


def known_form(score_mod: Callable[..., Any], mask_mod: Callable[..., Any]) -> Form | None:
    """The form of the two functions of `flex_attention`; None where it is none of the known ones."""
    try:
        return Form(*_cap(score_mod), *_band(mask_mod))
    except _Unknown:
        return None


def _graph(function: Callable[..., Any], *args: torch.Tensor) -> torch.fx.Graph:
    try:
        return make_fx(function)(*args).graph
    except Exception as error:  # whatever a user's function does with numbers on CPU
        raise _Unknown from error


def _value(values: dict[Any, Any], x: Any) -> Any:
    if isinstance(x, torch.fx.Node):
        return values[x]
    if type(x) in (int, float, bool):
        return x
    raise _Unknown


def _evaluated(graph: torch.fx.Graph, inputs: list[Any], rules: dict[Any, Callable[..., Any]]) -> Any:
    """The graph's result by `rules`, one for each operator."""
    values: dict[Any, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "output":
            return _value(values, node.args[0])
        elif node.op == "call_function" and node.target in rules:
            options = {k: _value(values, v) for k, v in node.kwargs.items() if k in ("alpha",)}
            values[node] = rules[node.target](*(_value(values, x) for x in _plain(node)), **options)
        else:
            raise _Unknown
    raise _Unknown


def _plain(node: torch.fx.Node) -> tuple[Any, ...]:
    return () if node.target in _TRUE else node.args


# ---------------------------------------------------------------------- scores
class _Scaled(NamedTuple):
    """``outer * tanh(inner * score)``, or ``inner * score`` where `outer` is None."""

    inner: float = 1.0
    outer: float | None = None


def _times(x: Any, y: Any) -> Any:
    if isinstance(y, _Scaled):
        x, y = y, x
    if not isinstance(x, _Scaled) or type(y) not in (int, float):
        raise _Unknown
    return _Scaled(x.inner * y) if x.outer is None else _Scaled(x.inner, x.outer * y)


def _over(x: Any, y: Any) -> Any:
    if type(y) not in (int, float) or y == 0:
        raise _Unknown
    return _times(x, 1 / y)


def _tanh(x: Any) -> Any:
    if not isinstance(x, _Scaled) or x.outer is not None:
        raise _Unknown
    return _Scaled(x.inner, 1.0)


_ON_SCORES = {aten.mul.Tensor: _times, aten.div.Tensor: _over, aten.tanh.default: _tanh}


def _cap(score_mod: Callable[..., Any]) -> tuple[float, float | None]:
    index = torch.zeros((), dtype=torch.int64)
    graph = _graph(score_mod, torch.ones(()), index, index.clone(), index.clone(), index.clone())
    found = _evaluated(graph, [_Scaled(), None, None, None, None], _ON_SCORES)
    if not isinstance(found, _Scaled) or found.inner <= 0 or (found.outer is not None and found.outer <= 0):
        raise _Unknown
    return (found.inner, None) if found.outer is None else (found.inner * found.outer, found.outer)


# ---------------------------------------------------------------------- masks
class _Affine(NamedTuple):
    """``i * query + j * key + constant``."""

    i: int
    j: int
    constant: int


class _Distance(NamedTuple):
    """``abs(query - key)``."""


class _Band(NamedTuple):
    """``least <= query - key <= most``; None is no bound."""

    least: int | None = None
    most: int | None = None


def _affine(x: Any) -> _Affine:
    if isinstance(x, _Affine):
        return x
    if type(x) is int:
        return _Affine(0, 0, x)
    raise _Unknown


def _sum(x: Any, y: Any, alpha: Any = 1) -> _Affine:
    x, y = _affine(x), _affine(y)
    if type(alpha) is not int:
        raise _Unknown
    return _Affine(*(a + alpha * b for a, b in zip(x, y, strict=True)))


def _difference(x: Any, y: Any, alpha: Any = 1) -> _Affine:
    return _sum(x, y, -alpha)


def _absolute(x: Any) -> _Distance:
    if x not in ((1, -1, 0), (-1, 1, 0)):
        raise _Unknown
    return _Distance()


def _not_negative(x: _Affine) -> _Band:
    if (x.i, x.j) == (1, -1):
        return _Band(least=-x.constant)
    if (x.i, x.j) == (-1, 1):
        return _Band(most=x.constant)
    if (x.i, x.j) == (0, 0) and x.constant >= 0:
        return _Band()
    raise _Unknown


def _at_least(x: Any, y: Any, more: int = 0) -> _Band:
    """The band of ``x >= y + more``."""
    if isinstance(y, _Distance) and type(x) is int:
        return _Band(more - x, x - more)
    return _not_negative(_sum(_difference(x, y), -more))


def _more(x: Any, y: Any) -> _Band:
    return _at_least(x, y, 1)


def _both(x: Any, y: Any) -> _Band:
    x, y = (_Band() if z is True else z for z in (x, y))
    if not isinstance(x, _Band) or not isinstance(y, _Band):
        raise _Unknown
    least = [z.least for z in (x, y) if z.least is not None]
    most = [z.most for z in (x, y) if z.most is not None]
    return _Band(max(least, default=None), min(most, default=None))


_TRUE = (aten.new_ones.default, aten.ones.default, aten.ones_like.default)
_ON_INDICES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_TRUE, _Band),
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _difference,
    aten.rsub.Scalar: lambda x, y, alpha=1: _sum(_affine(y), _affine(x), -alpha),
    aten.abs.default: _absolute,
    aten.neg.default: lambda x: _difference(0, x),
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor), _both),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _at_least),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _more),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), lambda x, y: _at_least(y, x)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), lambda x, y: _more(y, x)),
}


def _band(mask_mod: Callable[..., Any]) -> tuple[int | None, int | None]:
    indices = [torch.zeros((), dtype=torch.int64) for _ in range(4)]
    graph = _graph(mask_mod, *indices)
    found = _evaluated(graph, [None, None, _Affine(1, 0, 0), _Affine(0, 1, 0)], _ON_INDICES)
    if not isinstance(found, _Band):
        raise _Unknown
    return found.most, None if found.least is None else -found.least
