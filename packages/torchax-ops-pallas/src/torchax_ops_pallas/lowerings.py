"""Which calls of ATen ops go to a kernel."""

from __future__ import annotations

from typing import Any

from torchax.ops import aten, lowering

from .conditions import Choice, KernelUnavailable, small, unfit, unfit_on_gpu
from .settings import mode

# The kernels are imported where they are used: Pallas takes longer to import than all of torchax.
_SDPA = aten.scaled_dot_product_attention.default
choice = Choice("scaled_dot_product_attention", unfit, unfit_on_gpu=unfit_on_gpu, small=small)


def scale_of(query: Any, scale: float | None) -> float:
    """The factor of the scores."""
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


@lowering(_SDPA, whole=True, platforms=("tpu",), when=choice.on_tpu, priority=10)
@lowering(_SDPA, whole=True, when=choice.interpreted, priority=9)
def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Attention in kernels that never hold the scores: JAX's splash attention, our own where there is a mask tensor."""
    from .attention import attention

    interpret = mode() == "interpret"
    return attention(query, key, value, attn_mask, causal=is_causal, scale=scale_of(query, scale), interpret=interpret)


@lowering(_SDPA, whole=True, platforms=("gpu",), when=choice.on_gpu, priority=10)
def cudnn_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Attention in cuDNN, on NVIDIA's GPUs."""
    from . import cudnn

    return cudnn.cudnn_attention(query, key, value, attn_mask, causal=is_causal, scale=scale_of(query, scale))


REFUSALS = choice.refusals(_SDPA, whole=True)


__all__ = ["KernelUnavailable"]
