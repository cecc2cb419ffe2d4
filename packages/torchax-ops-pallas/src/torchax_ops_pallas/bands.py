"""Attention in a band of keys, in documents, with capped scores, the known forms of `flex_attention`: an operator and its lowerings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torchax.ops import lowering

from .conditions import Choice, unfit
from .settings import mode

# Kernels and torch's flex_attention are imported where they are used: they take long.
_NAME = "torchax::band_attention"
_library = torch.library.Library("torchax", "FRAGMENT")
_library.define(
    "band_attention(Tensor query, Tensor key, Tensor value, Tensor? documents, float scale, int? left=None, int? right=None, "
    "int prefix=0, float? soft_cap=None, str? unknown=None) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "band_attention", "CompositeImplicitAutograd")
def in_parts(
    query, key, value, documents, scale, left=None, right=None, prefix=0, soft_cap=None, unknown=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning: query i sees key j if ``-right <= i - j <= left`` or ``j < prefix``, and both are of one document.

    Scores become ``soft_cap * tanh(scores / soft_cap)``. Gives the result and the logarithm of each query's sum of exponentials.
    """
    from torch._higher_order_ops.flex_attention import math_attention

    def capped(score, batch, head, i, j):
        return score if soft_cap is None else soft_cap * torch.tanh(score / soft_cap)

    def seen(batch, head, i, j):
        found = batch.new_ones((), dtype=torch.bool)
        if right is not None:
            found = found & (j - i <= right)
        if left is not None:
            found = found & (i - j <= left)
        if prefix:
            found = found | (j < prefix)
        if documents is not None:
            of = (lambda x: documents[x]) if documents.dim() == 1 else (lambda x: documents[batch, x])
            found = found & (of(i) == of(j))
        return found

    out, lse, _ = math_attention(query, key, value, capped, (seen,), scale, {})
    return out, lse * math.log(2)


def _unfit(
    query: Any,
    key: Any,
    value: Any,
    documents: Any,
    scale: float,
    left: int | None = None,
    right: int | None = None,
    prefix: int = 0,
    soft_cap: float | None = None,
    unknown: str | None = None,
) -> str | None:
    """Why no kernel can serve the call, whatever the platform; None if one can."""
    reason = unknown or unfit(query, key, value, scale=scale, enable_gqa=True)
    if reason is not None:
        return reason
    queries, keys = query.shape[2], key.shape[2]
    if documents is not None:
        if queries != keys or tuple(documents.shape) not in ((keys,), (query.shape[0], keys)):
            return f"documents of shape {list(documents.shape)} are not those of {queries} queries and {keys} keys"
        if documents.dtype.kind not in "iub":
            return f"documents must be integers, they are {documents.dtype}"
    blind = (
        (right is not None and right < 0)  # the first query
        or (left is not None and queries - 1 - left > keys - 1)  # the last one
        or (left is not None and right is not None and left + right < 0)  # all
        or (documents is not None and left is not None and left < 0)  # those of the end of a document
    )
    if blind and (prefix <= 0 or documents is not None):
        return f"a query sees no key: {queries} queries, {keys} keys, {left} to the left and {right} to the right"
    return None


choice = Choice("flex_attention", _unfit)


@lowering(_NAME, whole=True, platforms=("tpu",), when=choice.on_tpu, priority=10)
@lowering(_NAME, whole=True, when=choice.interpreted, priority=9)
def band_attention(query, key, value, documents, scale, left=None, right=None, prefix=0, soft_cap=None, unknown=None):
    """JAX's splash attention, which skips blocks of keys outside of the band."""
    from .attention import banded_attention
    from .splash import Band

    options: dict[str, Any] = {"band": Band(left, right, prefix), "scale": scale, "soft_cap": soft_cap}
    return banded_attention(query, key, value, documents, **options, interpret=mode() == "interpret")


REFUSALS = choice.refusals(_NAME, whole=True)
