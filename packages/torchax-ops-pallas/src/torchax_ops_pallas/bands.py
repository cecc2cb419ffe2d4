"""Attention in a band of keys with capped scores, the known forms of `flex_attention`: an operator and its lowerings."""

from __future__ import annotations

from typing import Any

import torch
from torchax.ops import lowering

from .conditions import Choice, unfit
from .settings import mode

# Kernels and torch's flex_attention are imported where they are used: they take long.
_NAME = "torchax::band_attention"
_library = torch.library.Library("torchax", "FRAGMENT")
_library.define(
    "band_attention(Tensor query, Tensor key, Tensor value, float scale, int? left=None, int? right=None, "
    "float? soft_cap=None) -> Tensor"
)


@torch.library.impl(_library, "band_attention", "CompositeImplicitAutograd")
def in_parts(query, key, value, scale, left=None, right=None, soft_cap=None):
    """The meaning: query i sees key j if ``-right <= i - j <= left``; scores become ``soft_cap * tanh(scores / soft_cap)``."""
    from torch._higher_order_ops.flex_attention import math_attention

    def capped(score, batch, head, i, j):
        return score if soft_cap is None else soft_cap * torch.tanh(score / soft_cap)

    def seen(batch, head, i, j):
        found = batch.new_ones((), dtype=torch.bool)
        if right is not None:
            found = found & (j - i <= right)
        return found if left is None else found & (i - j <= left)

    return math_attention(query, key, value, capped, (seen,), scale, {})[0]


def _unfit(query: Any, key: Any, value: Any, scale: float, left=None, right=None, soft_cap=None) -> str | None:
    """Why no kernel can serve the call, whatever the platform; None if one can."""
    reason = unfit(query, key, value, scale=scale, enable_gqa=True)
    if reason is not None:
        return reason
    queries, keys = query.shape[2], key.shape[2]
    blind = (
        (right is not None and right < 0)  # the first query
        or (left is not None and queries - 1 - left > keys - 1)  # the last one
        or (left is not None and right is not None and left + right < 0)  # all
    )
    if blind:
        return f"a query sees no key: {queries} queries, {keys} keys, {left} to the left and {right} to the right"
    return None


choice = Choice("flex_attention", _unfit)


@lowering(_NAME, whole=True, platforms=("tpu",), when=choice.on_tpu, priority=10)
@lowering(_NAME, whole=True, when=choice.interpreted, priority=9)
def band_attention(query, key, value, scale, left=None, right=None, soft_cap=None):
    """JAX's splash attention, which skips blocks of keys outside of the band."""
    from .attention import banded_attention
    from .splash import Band

    options: dict[str, Any] = {"band": Band(left, right), "scale": scale, "soft_cap": soft_cap}
    return banded_attention(query, key, value, **options, interpret=mode() == "interpret")


@lowering(_NAME, whole=True, when=choice.required, priority=8)
def refuse_band_attention(query, key, value, scale, left=None, right=None, soft_cap=None):
    """The error of ``torchax.config.pallas = "required"`` for calls that no kernel takes."""
    raise choice.unavailable(query, key, value, scale, left, right, soft_cap)
