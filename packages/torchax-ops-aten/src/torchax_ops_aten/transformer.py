"""The fused forward of multi-head attention and of an encoder layer, which torch.nn takes in inference."""

import jax
import jax.numpy as jnp
from torchax.ops import aten, lowering

from .attention import masked_softmax
from .norm import moments, wide

_SOURCE, _KEYS = (
    0,
    1,
)  # what a mask speaks of: pairs of positions ``[L, L]``, or keys ``[N, L]``; else all of ``[N, H, L, L]``


def _project(x, weight, bias):
    out = jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    return (out if bias is None else out + wide(bias)).astype(x.dtype)


def _heads(x, heads: int):
    batch, length, features = x.shape
    return jnp.swapaxes(x.reshape(batch, length, heads, features // heads), 1, 2)


def _attention(query, key, value, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type):
    """Projected attention over ``[N, L, E]`` and its weights ``[N, H, L, S]``."""
    features = query.shape[-1]
    parts = []
    for i, x in enumerate((query, key, value)):
        rows = slice(i * features, (i + 1) * features)
        parts.append(_heads(_project(x, qkv_weight[rows], None if qkv_bias is None else qkv_bias[rows]), num_head))
    q, k, v = parts
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("nhle,nhse->nhls", q * (q.shape[-1] ** -0.5), k, preferred_element_type=accumulate)
    if mask is not None:
        # true, or for a float mask what is not zero, hides a key
        hidden = mask.astype(bool)
        if mask_type == _KEYS:
            hidden = hidden[:, None, None, :]
        scores = jnp.where(hidden, -jnp.inf, scores)
    weights = masked_softmax(scores, mask)[0]
    out = jnp.einsum("nhls,nhse->nlhe", weights.astype(v.dtype), v, preferred_element_type=accumulate).astype(
        query.dtype
    )
    return _project(out.reshape(query.shape), proj_weight, proj_bias), weights


@lowering(aten._native_multi_head_attention.default)
def native_multi_head_attention(
    query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias,
    mask=None, need_weights=True, average_attn_weights=True, mask_type=None,
):  # fmt: skip
    """Multi-head attention, and its weights where they are asked for."""
    out, weights = _attention(
        query, key, value, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type
    )
    if not need_weights:
        return out, jnp.zeros((0,), weights.dtype)
    return out, weights.mean(1) if average_attn_weights else weights


def _layer_norm(x, weight, bias, eps):
    wanted = wide(x)
    mean, var = moments(wanted, -1)
    return ((wanted - mean) * jax.lax.rsqrt(var + eps) * wide(weight) + wide(bias)).astype(x.dtype)


@lowering(aten._transformer_encoder_layer_fwd.default)
def transformer_encoder_layer_fwd(
    src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, use_gelu, norm_first, eps,
    norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2, ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2,
    mask=None, mask_type=None,
):  # fmt: skip
    """An encoder layer without dropout."""
    x = _layer_norm(src, norm_weight_1, norm_bias_1, eps) if norm_first else src
    x = src + _attention(x, x, x, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)[0]
    x = x if norm_first else _layer_norm(x, norm_weight_1, norm_bias_1, eps)
    y = _layer_norm(x, norm_weight_2, norm_bias_2, eps) if norm_first else x
    y = _project(y, ffn_weight_1, ffn_bias_1)
    y = jax.nn.gelu(wide(y), approximate=False).astype(y.dtype) if use_gelu else jax.nn.relu(y)
    x = x + _project(y, ffn_weight_2, ffn_bias_2)
    return x if norm_first else _layer_norm(x, norm_weight_2, norm_bias_2, eps)
