"""`torch.nn.attention.flex_attention` of tensors on device ``jax``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.flex_attention as torch_flex
from torch._higher_order_ops.flex_attention import math_attention
from torchax import convert
from torchax._functional import as_shapes
from torchax.ops import REGISTRY
from torchax.tensor import Tensor

from ._flex_forms import known_form

_BAND = "torchax::band_attention"


def flex_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As `torch.nn.attention.flex_attention.flex_attention`, with gradients, eagerly and inside `torchax.compile`.

    The meaning is torch's own: the function's checks and results, and `math_attention` for the scores, which are held in memory. Where a
    plugin has a kernel for attention in a band of keys, ``score_mod`` and block masks of that form go there, if no statistics are asked for.

    Args:
        query: ``[batch, query heads, length, features]``.
        *args: torch's.
        **kwargs: torch's.

    Raises:
        ValueError: shapes, block mask and heads do not fit each other, as in torch.
        RuntimeError: the block mask is on another device.
    """
    asked = _signature().bind_partial(query, *args, **kwargs).arguments
    return _ours(bool(asked.get("return_lse") or asked.get("return_aux")))(query, *args, **kwargs)


def _kernel_or_math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
) -> tuple[Any, Any, Any]:
    """As `_attention`, but without statistics where a kernel serves the call."""
    if _has_kernel(query, key, value, scale):
        form = known_form(score_mod, block_mask[-1])
        if form is not None:
            band = torch.ops.torchax.band_attention
            return band(query, key, value, scale * form.factor, form.left, form.right, form.soft_cap), None, None
    return _attention(query, key, value, score_mod, block_mask, scale, kernel_options)


def _has_kernel(*call: Any) -> bool:
    """Whether a plugin wants attention of this form, on this platform and for these shapes."""
    tensors = call[:3]
    if any(type(t) is not Tensor for t in tensors) or torch.is_autocast_enabled("jax"):
        return False
    return (
        REGISTRY.resolve(_BAND, convert.platform(tensors[0]._m.index), tensors[0].dtype, as_shapes(call, {}))
        is not None
    )


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    strangers = [t.device for t in (query, key, value) if type(t) is not Tensor and not _wrapped(t)]
    if strangers:
        raise RuntimeError(f"flex_attention takes query, key and value on one device; got one on {strangers[0]}")
    return math_attention(query, key, value, *rest)


def _wrapped(t: torch.Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(t)  # type: ignore[attr-defined]


@functools.cache
def _signature() -> inspect.Signature:
    return inspect.signature(_original())


def _original() -> Callable[..., Any]:
    return getattr(torch_flex.flex_attention, "__torchax__", torch_flex.flex_attention)


@functools.cache
def _ours(statistics: bool) -> Callable[..., Any]:
    """Torch's function, but for its refusal of devices that it does not know and for its own compiler.

    Both are names among the function's globals; torch has no other way in.
    """
    original: Any = _original()
    names = {
        **vars(torch_flex),
        "_validate_device": lambda *_: None,
        "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True,
        "setup_compilation_env": contextlib.nullcontext,
        "flex_attention_hop": _attention if statistics else _kernel_or_math,
    }
    made = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made


__all__ = ["flex_attention"]
