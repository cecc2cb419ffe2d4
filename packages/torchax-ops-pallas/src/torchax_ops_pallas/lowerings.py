"""Which calls of ATen ops go to a kernel."""

import jax
import jax.numpy as jnp
from torchax.ops import aten, lowering

# The kernels are imported where they are used: Pallas takes longer to import than all of torchax.
BLOCK = 128
# Keys and values of a head, twice for the pipeline, beside a block of scores.
_VECTOR_MEMORY = 4 * 2**20


def _plain(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Self-attention shapes on tile boundaries: no mask, no dropout, as many key heads as query heads."""
    return (
        attn_mask is None
        and dropout_p == 0.0
        and (scale is None or isinstance(scale, float | int))
        and query.ndim == key.ndim == value.ndim == 4
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (jnp.float32, jnp.bfloat16)
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and 0 not in query.shape
        and query.shape[3] == key.shape[3] == value.shape[3]
        and query.shape[3] % 64 == 0
        and query.shape[2] % BLOCK == 0
        and key.shape[2] % BLOCK == 0
        and key.shape[2] > 0
        and (not is_causal or query.shape[2] == key.shape[2])
    )


def _short_keys(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Keys and values of a head fit into the vector memory."""
    if not _plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa):
        return False
    keys, features = key.shape[2:]
    return 4 * keys * features * query.dtype.itemsize + 2 * 4 * BLOCK * keys <= _VECTOR_MEMORY


def _scale(query, scale):
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


@lowering(aten.scaled_dot_product_attention.default, whole=True, platforms=("tpu",), when=_short_keys, priority=11)
def short_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Attention in one kernel that holds all keys of a head."""
    from .attention import fused_attention

    with jax.enable_x64(False):
        return fused_attention(query, key, value, is_causal, _scale(query, scale))


@lowering(aten.scaled_dot_product_attention.default, whole=True, platforms=("tpu",), when=_plain, priority=10)
def long_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Flash attention, its gradients by kernels, too."""
    from .flash import flash_attention

    return flash_attention(query, key, value, is_causal, _scale(query, scale))
