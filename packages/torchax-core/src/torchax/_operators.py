"""Python's operators on tensors, without the way through torch's C++ dispatcher where nobody on it would notice.

``a + b`` passes the keys of autograd, functorch, autocast and Python before it comes back to `_dispatch`: more than half
of what the call costs, and it hands the GIL over once more. With no gradient to record and no mode that watches,
the way ends in the same rule with the same arguments, so the operator calls the rule. Otherwise it goes torch's way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack

from ._dispatch import RULES
from .tensor import Tensor

aten = torch.ops.aten

OPERATORS = {
    "__add__": aten.add.Tensor,
    "__radd__": aten.add.Tensor,
    "__sub__": aten.sub.Tensor,
    "__mul__": aten.mul.Tensor,
    "__rmul__": aten.mul.Tensor,
    "__truediv__": aten.div.Tensor,
    "__matmul__": aten.matmul.default,
}
INPLACE = {
    "add_": aten.add_.Tensor,
    "sub_": aten.sub_.Tensor,
    "mul_": aten.mul_.Tensor,
    "div_": aten.div_.Tensor,
    "__iadd__": aten.add_.Tensor,
    "__isub__": aten.sub_.Tensor,
    "__imul__": aten.mul_.Tensor,
    "__itruediv__": aten.div_.Tensor,
}

_grad_mode = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_autocast = torch._C._is_any_autocast_enabled
_profiler = torch.autograd._profiler_enabled
_tracing = torch._C._get_tracing_state
_increment_version = torch._C._increment_version
_forward_ad = torch.autograd.forward_ad


def _direct(a: Tensor, b: Any) -> bool:
    """Whether nothing between an operator and its rule would see the call."""
    kind = type(b)
    if (
        not (kind is Tensor or kind is float or kind is int)
        or type(a) is not Tensor
        or _function_modes()
        or _dispatch_modes()
        or peek_interpreter_stack() is not None
        or _forward_ad._current_level >= 0
        or _autocast()
        or _profiler()
        or _tracing() is not None
    ):
        return False
    return not (_grad_mode() and (a.requires_grad or (kind is Tensor and b.requires_grad)))


def _operator(name: str, op: Any) -> Callable[[Tensor, Any], Any]:
    torchs = getattr(torch.Tensor, name)

    @functools.wraps(torchs)
    def method(self: Tensor, other: Any) -> Any:
        return RULES[op]((self, other), {}) if _direct(self, other) else torchs(self, other)

    return method


def _inplace(name: str, op: Any) -> Callable[..., Any]:
    torchs = getattr(torch.Tensor, name)

    @functools.wraps(torchs)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not _direct(self, args[0]) or self.is_inference():
            return torchs(self, *args, **kwargs)
        RULES[op]((self, args[0]), {})
        _increment_version((self,))
        return self

    return method


def install() -> None:
    """Give `Tensor` its operators."""
    for table, make in ((OPERATORS, _operator), (INPLACE, _inplace)):
        for name, op in table.items():
            setattr(Tensor, name, make(name, op))
