"""Scaled dot-product attention, kept whole before autograd, and the kernels into which torch turns it."""

import jax
import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering

from .norm import wide


def _scale(query, scale):
    return query.shape[-1] ** -0.5 if scale is None else scale


def _repeat_heads(query, key, value):
    """Grouped-query attention: every head of key and value serves as many consecutive heads of the query."""
    key, value = (
        t if t.shape[-3] == query.shape[-3] else jnp.repeat(t, query.shape[-3] // t.shape[-3], axis=-3)
        for t in (key, value)
    )
    return key, value


def _grouped(query, key, value, attn_mask):
    """Query and mask with a dimension more, of the heads that share a key head: ``[..., key heads, sharing, L, E]``."""
    heads, shared = query.shape[-3], key.shape[-3]
    split = lambda t: t.reshape(*t.shape[:-3], shared, heads // shared, *t.shape[-2:])
    if attn_mask is not None and attn_mask.ndim > 2:
        attn_mask = split(attn_mask) if attn_mask.shape[-3] == heads else jnp.expand_dims(attn_mask, -3)
    return split(query), key, value, attn_mask


def _scores(query, key, attn_mask, is_causal, scale):
    """Masked scores ``[..., L, S]``; float32 for 16-bit inputs."""
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    g = "g" if query.ndim > key.ndim else ""
    scores = jnp.einsum(f"...{g}le,...se->...{g}ls", query, key, preferred_element_type=accumulate) * scale
    if is_causal:
        # the first query sees the first key alone, whatever the lengths
        rows, columns = (lax.broadcasted_iota(jnp.int32, scores.shape[-2:], i) for i in (0, 1))
        scores = jnp.where(columns <= rows, scores, -jnp.inf)
    if attn_mask is not None:
        scores = jnp.where(attn_mask, scores, -jnp.inf) if attn_mask.dtype == jnp.bool_ else scores + wide(attn_mask)
    return scores


def masked_softmax(scores, attn_mask):
    """Softmax over the last dimension, zero where a mask hides every key; with the logarithm of the sum."""
    if scores.shape[-1] == 0:
        return scores, jnp.full(scores.shape[:-1], -jnp.inf, scores.dtype)
    if attn_mask is None:  # XLA has a faster form of it
        return jax.nn.softmax(scores), jax.nn.logsumexp(scores, -1)
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    masked = top == -jnp.inf
    weights = jnp.exp(scores - jnp.where(masked, 0, top))
    total = weights.sum(-1, keepdims=True)
    probabilities = jnp.where(masked, 0, weights / jnp.where(masked, 1, total))
    return probabilities, (jnp.log(total) + top)[..., 0]


def _attend(query, key, value, attn_mask, is_causal, scale):
    probabilities, logsumexp = masked_softmax(_scores(query, key, attn_mask, is_causal, scale), attn_mask)
    g = "g" if query.ndim > value.ndim else ""
    out = jnp.einsum(
        f"...{g}ls,...sv->...{g}lv",
        probabilities.astype(value.dtype),
        value,
        preferred_element_type=probabilities.dtype,
    )
    return out.astype(query.dtype), probabilities, logsumexp


def _without_dropout(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    return dropout_p == 0.0


def _unbroadcast(grad, like):
    """Sum `grad` over the dimensions in which `like` was broadcast."""
    lead = grad.ndim - like.ndim
    axes = (*range(lead), *(i + lead for i, n in enumerate(like.shape) if n == 1 and grad.shape[i + lead] != 1))
    return grad.sum(axes).reshape(like.shape).astype(like.dtype) if axes else grad.astype(like.dtype)


def _attention_gradients(grad, query, key, value, attn_mask, out, is_causal, scale):
    """Gradients of query, key and value; the weights are computed again from query and key."""
    full_key, full_value = _repeat_heads(query, key, value) if query.ndim > 2 else (key, value)
    probabilities, _ = masked_softmax(_scores(query, full_key, attn_mask, is_causal, scale), attn_mask)
    wide_type = probabilities.dtype
    low = probabilities.astype(query.dtype)
    grad_value = jnp.einsum("...ls,...lv->...sv", low, grad, preferred_element_type=wide_type)
    grad_weights = jnp.einsum("...lv,...sv->...ls", grad, full_value, preferred_element_type=wide_type)
    along = (wide(grad) * wide(out)).sum(-1, keepdims=True)
    grad_scores = probabilities * (grad_weights - along)
    low_scores = (grad_scores * scale).astype(query.dtype)
    grad_query = jnp.einsum("...ls,...se->...le", low_scores, full_key, preferred_element_type=wide_type)
    grad_key = jnp.einsum("...ls,...le->...se", low_scores, query, preferred_element_type=wide_type)
    return (
        _unbroadcast(grad_query, query),
        _unbroadcast(_sum_heads(grad_key, key), key),
        _unbroadcast(_sum_heads(grad_value, value), value),
    )


def _sum_heads(grad, like):
    if grad.ndim < 3 or like.ndim < 3 or like.shape[-3] in (1, grad.shape[-3]):
        return grad
    heads = like.shape[-3]
    return grad.reshape(*grad.shape[:-3], heads, grad.shape[-3] // heads, *grad.shape[-2:]).sum(-3)


@lowering(aten.scaled_dot_product_attention.default, whole=True, when=_without_dropout)
def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """``softmax(query @ key.T * scale + mask) @ value``; rows that are masked everywhere give zeros."""
    scale = _scale(query, scale)
    if not enable_gqa or query.shape[-3] == key.shape[-3] == value.shape[-3]:
        return _attend(query, key, value, attn_mask, is_causal, scale)[0]
    if key.shape[-3] != value.shape[-3] or not query.ndim == key.ndim == value.ndim:
        return _attend(query, *_repeat_heads(query, key, value), attn_mask, is_causal, scale)[0]
    out = _attend(*_grouped(query, key, value, attn_mask), is_causal, scale)[0]
    return out.reshape(*out.shape[:-4], -1, *out.shape[-2:])


@lowering(aten._scaled_dot_product_flash_attention_for_cpu.default, when=_without_dropout)
def flash_attention_for_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """Attention and the logarithm of each row's sum of exponentials."""
    out, _, logsumexp = _attend(query, *_repeat_heads(query, key, value), attn_mask, is_causal, _scale(query, scale))
    return out, logsumexp


@lowering(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_attention_for_cpu_backward(
    grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    """Gradients of query, key and value."""
    return _attention_gradients(grad_out, query, key, value, attn_mask, out, is_causal, _scale(query, scale))
