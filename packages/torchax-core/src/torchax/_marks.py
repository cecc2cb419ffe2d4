"""Notices that tensors may have changed in what no program computes, so that compiled ones need not look at each of hundreds.

A tensor gets another `.grad` in two ways: Python sets it, and autograd's engine does, which makes the new gradient by one of the ops
below (it takes over an alias of what it was given, or a copy, or, where the graph is kept, a sum). An addition in place leaves the
tensor that is there.

It gets another storage by `torchax.tensor.become` and by `torch.utils.swap_tensors`; it begins to require a gradient where Python says
so, and when it is written with what requires one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Rule = Callable[[tuple[Any, ...], dict[str, Any]], Any]

ACCUMULATING = frozenset(("aten::detach", "aten::clone", "aten::new_empty_strided", "aten::copy_", "aten::add.Tensor"))


class _Marks:
    """Objects that are others whenever something may be another than before: take the mark first, then look.

    Attributes:
        grads: of gradients.
        tensors: of storages, and of tensors that begin to require a gradient.
    """

    grads: object = object()
    tensors: object = object()


marks = _Marks()


def accumulating(rule: Rule) -> Rule:
    """The rule of an op by which the engine makes a gradient."""

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        marks.grads = object()
        return rule(args, kwargs)

    return call


def writing(rule: Rule) -> Rule:
    """The rule of an op that writes an argument."""

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        marks.tensors = object()
        return rule(args, kwargs)

    return call


def leave(t: Any) -> None:
    """The tensor is about to get another storage: who has recorded the one that it has cannot go by it."""
    t._s.left += 1
    marks.tensors = object()


_grad: Any = torch.Tensor.grad
_requires_grad: Any = torch.Tensor.requires_grad


def _set_grad(t: torch.Tensor, value: torch.Tensor | None) -> None:
    _grad.__set__(t, value)
    marks.grads = object()


def _delete_grad(t: torch.Tensor) -> None:
    _grad.__delete__(t)
    marks.grads = object()


def _set_requires_grad(t: torch.Tensor, value: bool) -> None:
    _requires_grad.__set__(t, value)
    marks.tensors = object()


class Marked(torch.Tensor):
    """What Python may do to a tensor of device ``jax``, noted."""

    grad = property(_grad.__get__, _set_grad, _delete_grad, _grad.__doc__)  # type: ignore[assignment]
    requires_grad = property(_requires_grad.__get__, _set_requires_grad, None, _requires_grad.__doc__)  # type: ignore[assignment]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        marks.tensors = object()
        return torch.Tensor.requires_grad_(self, requires_grad)

    def _use_count(self) -> int:  # the first that torch.utils.swap_tensors asks for
        leave(self)
        return torch.Tensor._use_count(self)  # type: ignore[attr-defined]
