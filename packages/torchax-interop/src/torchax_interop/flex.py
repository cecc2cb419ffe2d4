"""`torch.nn.attention.flex_attention` of tensors on device ``jax``."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.flex_attention as torch_flex
from torch._higher_order_ops.flex_attention import math_attention
from torchax.tensor import Tensor


def flex_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As `torch.nn.attention.flex_attention.flex_attention`, with gradients, eagerly and inside `torchax.compile`.

    The meaning is torch's own: the function's checks and results, and `math_attention` for the scores, which are held in memory.

    Args:
        query: ``[batch, query heads, length, features]``.
        *args: torch's.
        **kwargs: torch's.

    Raises:
        ValueError: shapes, block mask and heads do not fit each other, as in torch.
        RuntimeError: the block mask is on another device.
    """
    return _ours()(query, *args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    strangers = [t.device for t in (query, key, value) if type(t) is not Tensor and not _wrapped(t)]
    if strangers:
        raise RuntimeError(f"flex_attention takes query, key and value on one device; got one on {strangers[0]}")
    return math_attention(query, key, value, score_mod, block_mask, scale, kernel_options)


def _wrapped(t: torch.Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(t)  # type: ignore[attr-defined]


@functools.cache
def _ours() -> Callable[..., Any]:
    """Torch's function, but for its refusal of devices that it does not know and for its own compiler.

    Both are names among the function's globals; torch has no other way in.
    """
    original = getattr(torch_flex.flex_attention, "__torchax__", torch_flex.flex_attention)
    names = {
        **vars(torch_flex),
        "_validate_device": lambda *_: None,
        "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True,
        "setup_compilation_env": contextlib.nullcontext,
        "flex_attention_hop": _attention,
    }
    made = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made


__all__ = ["flex_attention"]
