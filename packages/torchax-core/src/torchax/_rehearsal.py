"""What CPU torch does with a call, found out on CPU tensors of the same metadata, where meta kernels do not say it.

They let pass some calls that CPU torch refuses. And ops differ in what they do with a tensor to be written that does
not fit the result: some resize it (with a warning or without), some cast, some refuse.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten

from ._execute import state
from ._infer import on_cpu, pivots_of
from ._storage import TensorMeta, extent
from .convert import to_cpu
from .tensor import Tensor

_MOST = 1 << 16  # elements that a rehearsal may hold


class Outcome(NamedTuple):
    """What became of a rehearsal.

    Attributes:
        error: what CPU torch raises; None if nothing.
        warned: whether it warns that it resizes.
        layouts: shapes and strides of the written tensors afterwards.
    """

    error: Exception | None
    warned: bool
    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def rehearse(
    func: Any, twin: Any, args: tuple[Any, ...], kwargs: dict[str, Any], targets: list[Tensor], metas: Any
) -> Outcome | None:
    """Run `func` on CPU tensors of the same metadata.

    Args:
        func: the in-place op, or the one with ``out=``.
        twin: its functional op.
        args: the call's arguments.
        kwargs: its keyword arguments.
        targets: the tensors among them that are written.
        metas: metadata of the results.

    Returns:
        None where that says nothing: the tensors are large, or the op fails on their values.
    """
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    if sum(extent(t.shape, t.stride()) for t in tensors) + sum(m.numel for m in metas) > _MOST:
        return None
    copies: dict[int, torch.Tensor] = {}
    pivots = pivots_of(func, args)
    out_names = {a.name for a in func._schema.arguments if a.is_out}
    written = {id(t) for t in targets} if out_names else set()

    def stand_in(x: Tensor) -> torch.Tensor:
        if id(x) not in copies:
            outs = id(x) in written  # row-major: not every op of CPU torch survives others
            copies[id(x)] = torch.zeros(x._m.shape, dtype=x._m.dtype) if outs else _filled(x._m, id(x) in pivots)
        return copies[id(x)]

    cargs, ckwargs = on_cpu(args, stand_in), on_cpu(kwargs, stand_in)
    error = None
    with torch.no_grad(), torch.random.fork_rng(devices=()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _with_warnings(lambda: func(*cargs, **ckwargs))
        except Exception as raised:
            error = raised
            try:
                copies.clear()
                rest = {k: v for k, v in kwargs.items() if k not in out_names}
                twin(*on_cpu(args, stand_in), **on_cpu(rest, stand_in))
            except Exception:  # these values are wrong, or these operands
                return None
    after = [copies[id(t)] for t in targets if id(t) in copies]
    layouts = tuple((tuple(t.shape), tuple(t.stride())) for t in after) if error is None else ()
    return Outcome(error, any("resized" in str(w.message) for w in caught), layouts)


def refused(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """What CPU torch raises for a call that its meta kernel lets pass; None if nothing.

    Ones and zeros stand in for the values. If CPU torch refuses these it is asked again with the values themselves,
    so that they are fetched for a call that goes wrong only. While tracing there are none, and nothing is refused.
    """
    tensors = [t for t in tree_flatten((args, kwargs))[0] if type(t) is Tensor]
    if state.executor.owner is not None or sum(extent(t._m.shape, t._m.strides) for t in tensors) > _MOST:
        return None
    ones = pivots_of(func, args) | {
        id(a) for a, s in zip(args, func._schema.arguments, strict=False) if s.name == "other"
    }  # a divisor
    if _raised(func, args, kwargs, lambda t: _filled(t._m, id(t) in ones)) is None:
        return None
    return _raised(func, args, kwargs, lambda t: to_cpu(t, str(func)))


def _raised(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stand_in: Callable[[Tensor], torch.Tensor]
) -> Exception | None:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            func(*on_cpu(args, stand_in), **on_cpu(kwargs, stand_in))
    except NotImplementedError:  # CPU torch has no kernel for the dtype; that does not mean that there is none here
        return None
    except Exception as error:
        return error
    return None


def _with_warnings(call: Callable[[], Any]) -> None:
    """Call; warnings of torch's C++ are given to Python before this returns, not when the outermost op does."""

    def once(x: float) -> float:
        call()
        return x

    torch.zeros(1).apply_(once)


def _filled(meta: TensorMeta, ones: bool) -> torch.Tensor:
    """Indices in range, weights that sum up; matrices that have inverses and factors."""
    inexact = meta.dtype.is_floating_point or meta.dtype.is_complex
    square = len(meta.shape) > 1 and meta.shape[-1] == meta.shape[-2]
    filled = torch.ones if ones or (inexact and not square) else torch.zeros
    value = filled(extent(meta.shape, meta.strides), dtype=meta.dtype).as_strided(meta.shape, meta.strides)
    if inexact and square:
        value.diagonal(dim1=-2, dim2=-1).fill_(1)
    return value
