"""`torch.nn.attention.flex_attention` of tensors on device ``jax``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
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

from ._flex_cache import form_of
from ._flex_forms import Form, Unknown

_BAND = "torchax::band_attention"


def flex_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As `torch.nn.attention.flex_attention.flex_attention`, with gradients, eagerly and inside `torchax.compile`.

    The meaning is torch's own: the function's checks and results, and `math_attention` for the scores, which are held in memory. Where a
    plugin has a kernel for attention in a band of keys, a prefix or documents, ``score_mod`` and block masks of that form go there.

    Args:
        query: ``[batch, query heads, length, features]``.
        *args: torch's.
        **kwargs: torch's.

    Raises:
        ValueError: shapes, block mask and heads do not fit each other, as in torch.
        RuntimeError: the block mask is on another device; or a kernel is required (``torchax.config.pallas``), and none serves the call.
    """
    asked = _signature().bind_partial(query, *args, **kwargs).arguments
    aux = asked.get("return_aux")
    return _ours(aux is not None and aux.max_scores)(query, *args, **kwargs)


def _kernel_or_math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    *,
    greatest: bool,
) -> tuple[Any, Any, Any]:
    """As `_attention`, but without the greatest scores where a kernel serves the call."""
    tensors = (query, key, value)
    if all(type(t) is Tensor for t in tensors) and _served(*tensors, None, scale):
        form, why = _form(score_mod, block_mask[-1], greatest)
        shape = (form.left, form.right, form.prefix, form.soft_cap, why)
        if why is None or _served(*tensors, None, scale, *shape):  # by an error, where a kernel is required
            out, lse = torch.ops.torchax.band_attention(*tensors, form.documents, scale * form.factor, *shape)
            return out, lse / math.log(2), None
    return _attention(query, key, value, score_mod, block_mask, scale, kernel_options)


def _form(
    score_mod: Callable[..., torch.Tensor], mask_mod: Callable[..., torch.Tensor], greatest: bool
) -> tuple[Form, str | None]:
    """The form of a call; or why a kernel cannot serve it."""
    if greatest:
        return Form(), "the kernel does not give the greatest scores (AuxRequest(max_scores=True))"
    if torch.is_autocast_enabled("jax"):
        return Form(), "autocast is on, which casts parts of flex_attention: cast query, key and value instead"
    try:
        form = form_of(score_mod, mask_mod)
    except Unknown as error:
        return Form(), str(error)
    if form.documents is not None and type(form.documents) is not Tensor:
        return Form(), f"the documents are on {form.documents.device}"
    return form, None


def _served(*call: Any) -> bool:
    """Whether a plugin wants attention of this form, on this platform and for these shapes."""
    platform = convert.platform(call[0]._m.index)
    return REGISTRY.resolve(_BAND, platform, call[0].dtype, as_shapes(call, {})) is not None


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
def _ours(greatest: bool) -> Callable[..., Any]:
    """Torch's function, but for its refusal of devices that it does not know and for its own compiler.

    Both are names among the function's globals; torch has no other way in.
    """
    original: Any = _original()
    names = {
        **vars(torch_flex),
        "_validate_device": lambda *_: None,
        "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True,
        "setup_compilation_env": contextlib.nullcontext,
        "flex_attention_hop": functools.partial(_kernel_or_math, greatest=greatest),
    }
    made = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made


__all__ = ["flex_attention"]
