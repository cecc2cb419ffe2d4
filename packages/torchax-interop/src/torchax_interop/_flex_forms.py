"""Which functions given to `flex_attention` are of a known form: capped scores, and keys in a band, a prefix, or the query's document.

They are recorded on CPU numbers and their graphs read: a form is known if every operation in it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


class Form(NamedTuple):
    """Scores times `factor`, then ``soft_cap * tanh(score / soft_cap)``, and which keys a query sees.

    Query i sees key j if ``-right <= i - j <= left`` or ``j < prefix``, and, where there are documents, if ``documents[..., i] ==
    documents[..., j]``; they are a tensor that the mask function reads, ``[length]`` or ``[batch, length]``.
    """

    factor: float = 1.0
    soft_cap: float | None = None
    left: int | None = None
    right: int | None = None
    prefix: int = 0
    documents: torch.Tensor | None = None


class Unknown(Exception):
    """Something in a function is of no known form; says what."""


def known_form(score_mod: Callable[..., Any], mask_mod: Callable[..., Any]) -> Form:
    """The form of the two functions of `flex_attention`.

    Raises:
        Unknown: it is none of the known ones.
    """
    return Form(*_named("score_mod", _cap, score_mod), *_named("the mask", _mask, mask_mod))


def _named(name: str, read: Callable[..., Any], function: Callable[..., Any]) -> Any:
    try:
        return read(function)
    except Unknown as error:
        raise Unknown(f"{name} is of no known form: {error}") from error


def _graph(function: Callable[..., Any], *args: torch.Tensor) -> torch.fx.GraphModule:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    try:
        with TransformGetItemToIndex(), torch.no_grad():
            return make_fx(lambda *given: function(*given))(*args)  # parameters with defaults keep them
    except Exception as error:  # whatever a user's function does with numbers on CPU
        raise Unknown(
            f"recording it raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _value(values: dict[Any, Any], x: Any) -> Any:
    if isinstance(x, torch.fx.Node):
        return values[x]
    if type(x) in (int, float, bool):
        return x
    if isinstance(x, list | tuple):
        return [_value(values, y) for y in x]
    raise Unknown(f"it uses {x!r}")


def _evaluated(module: torch.fx.GraphModule, inputs: list[Any], rules: dict[Any, Callable[..., Any]]) -> Any:
    """The graph's result by `rules`, one for each operator."""
    values: dict[Any, Any] = {}
    given = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "output":
            return _value(values, node.args[0])
        elif node.op == "get_attr":
            values[node] = _Table(getattr(module, str(node.target)))
        elif node.op == "call_function" and node.target in rules:
            options = {k: _value(values, v) for k, v in node.kwargs.items() if k in ("alpha",)}
            try:
                values[node] = rules[node.target](*(_value(values, x) for x in _plain(node)), **options)
            except Unknown as error:
                raise error if error.args else Unknown(f"{node.target} of that") from error
        else:
            raise Unknown(f"it uses {node.target}")
    raise Unknown("it gives nothing")


def _plain(node: torch.fx.Node) -> tuple[Any, ...]:
    return () if node.target in (*_TRUE, *_FALSE) else node.args


# ---------------------------------------------------------------------- scores
class _Scaled(NamedTuple):
    """``outer * tanh(inner * score)``, or ``inner * score`` where `outer` is None."""

    inner: float = 1.0
    outer: float | None = None


def _times(x: Any, y: Any) -> Any:
    if isinstance(y, _Scaled):
        x, y = y, x
    if not isinstance(x, _Scaled) or type(y) not in (int, float):
        raise Unknown
    return _Scaled(x.inner * y) if x.outer is None else _Scaled(x.inner, x.outer * y)


def _over(x: Any, y: Any) -> Any:
    if type(y) not in (int, float) or y == 0:
        raise Unknown
    return _times(x, 1 / y)


def _tanh(x: Any) -> Any:
    if not isinstance(x, _Scaled) or x.outer is not None:
        raise Unknown
    return _Scaled(x.inner, 1.0)


_ON_SCORES = {aten.mul.Tensor: _times, aten.div.Tensor: _over, aten.tanh.default: _tanh}


def _cap(score_mod: Callable[..., Any]) -> tuple[float, float | None]:
    index = torch.zeros((), dtype=torch.int64, device="cpu")
    module = _graph(score_mod, torch.ones((), device="cpu"), index, index.clone(), index.clone(), index.clone())
    found = _evaluated(module, [_Scaled(), None, None, None, None], _ON_SCORES)
    if not isinstance(found, _Scaled) or found.inner <= 0 or (found.outer is not None and found.outer <= 0):
        raise Unknown("it is no positive multiple of the score")
    return (found.inner, None) if found.outer is None else (found.inner * found.outer, found.outer)


# ---------------------------------------------------------------------- masks
class _Affine(NamedTuple):
    """``i * query + j * key + constant``."""

    i: int
    j: int
    constant: int


class _Distance(NamedTuple):
    """``abs(query - key)``."""


class _Table(NamedTuple):
    """A tensor that the function reads."""

    tensor: torch.Tensor


class _Entry(NamedTuple):
    """``tensor[query]``, or ``tensor[batch, query]``, or that of the key."""

    tensor: torch.Tensor
    of: _Affine


class _Batch(NamedTuple):
    """The number of the batch."""


class _Prefix(NamedTuple):
    """``key < end``."""

    end: int


class _Seen(NamedTuple):
    """``least <= query - key <= most`` or ``key < prefix``, and both in one document; None is no bound."""

    least: int | None = None
    most: int | None = None
    prefix: int = 0
    documents: torch.Tensor | None = None


def _affine(x: Any) -> _Affine:
    if isinstance(x, _Affine):
        return x
    if type(x) is int:
        return _Affine(0, 0, x)
    raise Unknown


def _sum(x: Any, y: Any, alpha: Any = 1) -> _Affine:
    x, y = _affine(x), _affine(y)
    if type(alpha) is not int:
        raise Unknown
    return _Affine(*(a + alpha * b for a, b in zip(x, y, strict=True)))


def _difference(x: Any, y: Any, alpha: Any = 1) -> _Affine:
    return _sum(x, y, -alpha)


def _absolute(x: Any) -> _Distance:
    if not isinstance(x, _Affine) or x not in ((1, -1, 0), (-1, 1, 0)):
        raise Unknown
    return _Distance()


def _not_negative(x: _Affine) -> _Seen | _Prefix:
    if (x.i, x.j) == (1, -1):
        return _Seen(least=-x.constant)
    if (x.i, x.j) == (-1, 1):
        return _Seen(most=x.constant)
    if (x.i, x.j) == (0, -1):
        return _Prefix(x.constant + 1)
    if (x.i, x.j) == (0, 0) and x.constant >= 0:
        return _Seen()
    raise Unknown


def _at_least(x: Any, y: Any, more: int = 0) -> _Seen | _Prefix:
    """The band of ``x >= y + more``."""
    if isinstance(y, _Distance) and type(x) is int:
        return _Seen(more - x, x - more)
    return _not_negative(_sum(_difference(x, y), -more))


def _more(x: Any, y: Any) -> _Seen | _Prefix:
    return _at_least(x, y, 1)


def _entry(x: Any, indices: Any) -> _Entry:
    """Of a table of positions, or one for each batch."""
    *lead, last = indices
    fits = isinstance(x, _Table) and x.tensor.dim() == len(indices) and all(isinstance(i, _Batch) for i in lead)
    if not fits or len(lead) > 1 or not isinstance(last, _Affine) or last not in (_QUERY, _KEY):
        raise Unknown("it reads a tensor otherwise than at the query or the key")
    return _Entry(x.tensor, last)


def _equal(x: Any, y: Any) -> _Seen:
    entries = isinstance(x, _Entry) and isinstance(y, _Entry)
    if not entries or x.tensor is not y.tensor or {x.of, y.of} != {_QUERY, _KEY}:
        raise Unknown("it compares for equality what is not the document of the query and that of the key")
    return _Seen(documents=x.tensor)


def _both(x: Any, y: Any) -> Any:
    x, y = (_Seen() if z is True else z for z in (x, y))
    if not isinstance(x, _Seen) or not isinstance(y, _Seen):
        raise Unknown("of it and another condition, one is no band")
    if x.documents is not None and y.documents is not None and x.documents is not y.documents:
        raise Unknown("it has documents of two kinds")
    documents = y.documents if x.documents is None else x.documents
    for one, other in ((x, y), (y, x)):
        if one[:3] == (None, None, 0):
            return other._replace(documents=documents)
    if x.prefix or y.prefix:
        raise Unknown("a prefix is cut by another condition")
    least = [z.least for z in (x, y) if z.least is not None]
    most = [z.most for z in (x, y) if z.most is not None]
    return _Seen(max(least, default=None), min(most, default=None), 0, documents)


def _either(x: Any, y: Any) -> Any:
    for one, other in ((x, y), (y, x)):
        if one is False:
            return other
        if isinstance(one, _Prefix) and isinstance(other, _Prefix):
            return _Prefix(max(one.end, other.end))
        if isinstance(one, _Prefix) and isinstance(other, _Seen) and other.documents is None:
            return other._replace(prefix=max(one.end, other.prefix))
    raise Unknown("of it or another condition, neither is a prefix of keys")


_TRUE = (aten.new_ones.default, aten.ones.default, aten.ones_like.default)
_FALSE = (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)
_QUERY, _KEY = _Affine(1, 0, 0), _Affine(0, 1, 0)
_ON_INDICES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_TRUE, _Seen),
    **dict.fromkeys(_FALSE, lambda: False),
    aten.index.Tensor: _entry,
    aten.eq.Tensor: _equal,
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _difference,
    aten.rsub.Scalar: lambda x, y, alpha=1: _sum(_affine(y), _affine(x), -alpha),
    aten.abs.default: _absolute,
    aten.neg.default: lambda x: _difference(0, x),
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor), _both),
    **dict.fromkeys((aten.bitwise_or.Tensor, aten.logical_or.default), _either),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _at_least),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _more),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), lambda x, y: _at_least(y, x)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), lambda x, y: _more(y, x)),
}


def _mask(mask_mod: Callable[..., Any]) -> tuple[int | None, int | None, int, torch.Tensor | None]:
    indices = [torch.zeros((), dtype=torch.int64, device="cpu") for _ in range(4)]
    found = _evaluated(_graph(mask_mod, *indices), [_Batch(), None, _QUERY, _KEY], _ON_INDICES)
    if not isinstance(found, _Seen):
        raise Unknown("it is no band, no prefix and no document")
    return found.most, None if found.least is None else -found.least, max(found.prefix, 0), found.documents
