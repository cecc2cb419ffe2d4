"""Attention with dropout: a seed is drawn, and an operator that takes it computes the same values whenever it is called.

So forward and backward, and the parts of which gradients of gradients are made, drop the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torchax.ops import aten, lowering, stateful

from .conditions import Choice, Condition, unfit
from .lowerings import choice as of_attention
from .lowerings import scale_of
from .settings import mode

# The kernels are imported where they are used: Pallas takes longer to import than all of torchax.
_SDPA = aten.scaled_dot_product_attention.default
_SEED, _KEPT, _ATTENTION = "torchax::attention_seed", "torchax::kept_weights", "torchax::dropout_attention"
_library = torch.library.Library("torchax", "FRAGMENT")
_library.define("attention_seed(Tensor like) -> Tensor")
_library.define("kept_weights(Tensor seed, int batch, int heads, int queries, int keys, float dropout_p) -> Tensor")
_library.define(
    "dropout_attention(Tensor query, Tensor key, Tensor value, Tensor seed, Tensor? attn_mask, float dropout_p, "
    "bool is_causal, float scale, bool enable_gqa) -> Tensor"
)


@stateful(_SEED, random=True, meta=False)
def attention_seed(like, *, key):
    """A fresh seed, ``int32[2]``, on the device of `like`."""
    import jax

    return jax.lax.bitcast_convert_type(jax.random.bits(key, (2,), "uint32"), "int32")


@lowering(_KEPT, meta=False)
def kept_weights(seed, batch, heads, queries, keys, dropout_p):
    """Which weights are kept, bool ``[batch, heads, queries, keys]``: those that the kernels keep."""
    from .dropout import dense

    return dense(seed, batch, heads, queries, keys, dropout_p)


@torch.library.impl(_library, "dropout_attention", "CompositeImplicitAutograd")
def in_parts(query, key, value, seed, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """The meaning: weights that `kept_weights` drops are zero, the others divided by ``1 - dropout_p``."""
    kept = torch.ops.torchax.kept_weights(seed, *query.shape[:3], key.shape[2], dropout_p)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
    weights = aten._safe_softmax(scores, -1).masked_fill(~kept, 0.0) / (1 - dropout_p)
    return weights.to(value.dtype) @ value


def _unfit(query, key, value, seed, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> str | None:
    return unfit(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


_choice = Choice("scaled_dot_product_attention", _unfit)


@lowering(_ATTENTION, whole=True, platforms=("tpu",), when=_choice.on_tpu, priority=10)
@lowering(_ATTENTION, whole=True, when=_choice.interpreted, priority=9)
def dropout_attention(query, key, value, seed, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """Our own kernels, which compute the dropped weights where they need them."""
    from .attention import attention

    options: dict[str, Any] = {"causal": is_causal, "scale": scale, "dropout": dropout_p, "seed": seed}
    return attention(query, key, value, attn_mask, **options, interpret=mode() == "interpret")


def _with_dropout(condition: Condition) -> Condition:
    def refusal(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options: Any) -> str | None:
        if dropout_p == 0:
            return "there is no dropout"
        return condition.refusal(query, key, value, attn_mask, dropout_p, is_causal, **options)

    return Condition(f"there is dropout and {condition.__name__}", refusal)


@lowering(_SDPA, kind="composite", whole=True, platforms=("tpu",), when=_with_dropout(of_attention.on_tpu), priority=12)
@lowering(_SDPA, kind="composite", whole=True, when=_with_dropout(of_attention.interpreted), priority=11)
def attention_with_dropout(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """Draws a seed for kernels of ours, which never hold the scores nor the mask of dropout."""
    seed = torch.ops.torchax.attention_seed(query.detach())
    call = (query, key, value, seed, attn_mask, dropout_p, is_causal)
    return torch.ops.torchax.dropout_attention(*call, scale_of(query, scale), enable_gqa)
