"""Notices that a tensor may have got another `.grad`, so that compiled programs need not look at each of hundreds.

There are two ways: Python sets it, and autograd's engine does, which makes the new gradient by one of the ops below (it takes over
an alias of what it was given, or a copy, or, where the graph is kept, a sum). An addition in place leaves the tensor that is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_descriptor: Any = torch.Tensor.grad
_get, _set, _delete = _descriptor.__get__, _descriptor.__set__, _descriptor.__delete__

ACCUMULATING = frozenset(("aten::detach", "aten::clone", "aten::new_empty_strided", "aten::copy_", "aten::add.Tensor"))


class _Grads:
    """`mark` is another object whenever a gradient may be another tensor than before: take it first, then look."""

    mark: object = object()


grads = _Grads()


def marking(rule: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """The rule of an op by which the engine makes a gradient."""

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        grads.mark = object()
        return rule(args, kwargs)

    return call


def _set_grad(t: torch.Tensor, value: torch.Tensor | None) -> None:
    _set(t, value)
    grads.mark = object()


def _delete_grad(t: torch.Tensor) -> None:
    _delete(t)
    grads.mark = object()


grad = property(_get, _set_grad, _delete_grad, torch.Tensor.grad.__doc__)
