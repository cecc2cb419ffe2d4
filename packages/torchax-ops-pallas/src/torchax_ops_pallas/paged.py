"""Attention of a decoding step over a cache of keys and values in pages: the operator, its meaning, and the kernel's lowering.

The kernel is JAX's, `jax.experimental.pallas.ops.tpu.paged_attention`; it reads the pages where they lie, and rounds them to bfloat16.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax.ops import lowering

from .conditions import Choice
from .settings import mode

# Kernels are imported where they are used: Pallas takes longer to import than all of torchax.
_NAME = "torchax::paged_attention"
_LANES = 128
_KEYS_AT_ONCE = 512  # of a block: enough for the matrix unit, two copies of keys and values still fit the vector memory
_library = torch.library.Library("torchax", "FRAGMENT")
_library.define(
    "paged_attention(Tensor query, Tensor key_pages, Tensor value_pages, Tensor lengths, Tensor page_indices, float scale, "
    "float? soft_cap=None) -> Tensor"
)


def paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    lengths: torch.Tensor,
    page_indices: torch.Tensor,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Attention of one query for each sequence over its keys and values, which lie in pages of a common cache.

    Position ``n`` of sequence ``b`` lies in page ``page_indices[b, n // page_size]``, at ``n % page_size``. Tensors may be on any device; there are
    no gradients.

    Args:
        query: ``[sequences, heads, features]``, floating point.
        key_pages: ``[key heads, pages, page_size, features]``, of the dtype of `query`; the number of key heads divides that of heads.
        value_pages: as `key_pages`.
        lengths: ``[sequences]``, int32: how many keys each sequence has, at least one.
        page_indices: ``[sequences, pages of a sequence]``, int32: entries beyond a sequence's length are not looked at, but must be pages.
        scale: factor of the scores; None for ``features ** -0.5``.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``; None leaves them.

    Returns:
        ``[sequences, heads, features]`` in the dtype of `query`.

    Raises:
        ValueError: shapes do not fit each other.
        TypeError: of the dtypes.
    """
    _check(query, key_pages, value_pages, lengths, page_indices)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.torchax.paged_attention(query, key_pages, value_pages, lengths, page_indices, scale, soft_cap)


def _check(query: Any, key_pages: Any, value_pages: Any, lengths: Any, page_indices: Any) -> None:
    ranks = {
        "query": (query, 3),
        "key_pages": (key_pages, 4),
        "lengths": (lengths, 1),
        "page_indices": (page_indices, 2),
    }
    for name, (t, rank) in ranks.items():
        if t.dim() != rank:
            raise ValueError(f"paged_attention takes {name} with {rank} dimensions; its shape is {list(t.shape)}")
    if key_pages.shape != value_pages.shape:
        raise ValueError(
            f"key_pages and value_pages must be of one shape; they are {list(key_pages.shape)} and {list(value_pages.shape)}"
        )
    if query.shape[2] != key_pages.shape[3] or not key_pages.shape[0] or query.shape[1] % key_pages.shape[0]:
        raise ValueError(
            f"queries [sequences, heads, features] {list(query.shape)} do not fit pages [key heads, pages, page_size, features] "
            f"{list(key_pages.shape)}: features must be equal, and key heads divide heads"
        )
    if not lengths.shape[0] == page_indices.shape[0] == query.shape[0]:
        raise ValueError(
            f"query, lengths and page_indices are of {query.shape[0]}, {lengths.shape[0]} and {page_indices.shape[0]} sequences"
        )
    if not query.dtype == key_pages.dtype == value_pages.dtype or not query.dtype.is_floating_point:
        raise TypeError(
            f"query and pages must be of one floating-point dtype; they are {query.dtype}, {key_pages.dtype}, {value_pages.dtype}"
        )
    if not lengths.dtype == page_indices.dtype == torch.int32:
        raise TypeError(
            f"lengths and page_indices must be int32; they are {lengths.dtype} and {page_indices.dtype}: call .int()"
        )


@torch.library.impl(_library, "paged_attention", "CompositeExplicitAutograd")
def in_parts(query, key_pages, value_pages, lengths, page_indices, scale, soft_cap=None):
    """The meaning, in torch's ops: each sequence's pages are gathered."""
    sequences, _, features = query.shape
    keys, values = (
        pages[:, page_indices].movedim(1, 0).reshape(sequences, pages.shape[0], -1, features)
        for pages in (key_pages, value_pages)
    )
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.reshape(sequences, keys.shape[1], -1, features).to(wide)
    scores = grouped @ keys.to(wide).transpose(-2, -1) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    there = torch.arange(keys.shape[2], dtype=torch.int32, device=query.device) < lengths[:, None]
    weights = scores.masked_fill(~there[:, None, None], -torch.inf).softmax(-1)
    return (weights @ values.to(wide)).reshape(query.shape).to(query.dtype)


# ---------------------------------------------------------------------- kernel
def _unfit(query: Any, key_pages: Any, value_pages: Any, lengths: Any, page_indices: Any, *_: Any) -> str | None:
    """Why the kernel cannot serve the call, whatever the platform; None if it can."""
    conditions = (
        (query.dtype.name == "bfloat16", lambda: f"the kernel computes in bfloat16, the dtype is {query.dtype}"),
        (
            query.shape[2] % _LANES == 0,
            lambda: f"heads must be a multiple of {_LANES} wide, they are {query.shape[2]}",
        ),
        (key_pages.shape[2] % 8 == 0, lambda: f"page_size must be a multiple of 8, it is {key_pages.shape[2]}"),
        (0 not in (*query.shape, *key_pages.shape, *page_indices.shape), lambda: "an operand is empty"),
    )
    return next((words() for holds, words in conditions if not holds), None)


choice = Choice("paged_attention", _unfit, "the kernel", "this one", divisible=False)


@lowering(_NAME, platforms=("tpu",), when=choice.on_tpu, priority=10)
@lowering(_NAME, when=choice.interpreted, priority=9)
def paged_attention_kernel(query, key_pages, value_pages, lengths, page_indices, scale, soft_cap=None):
    """JAX's kernel: each block of pages is copied into the vector memory while the one before is computed."""
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    pages, size = page_indices.shape[1], key_pages.shape[2]
    at_once = max(n for n in range(1, pages + 1) if pages % n == 0 and (n == 1 or n * size <= _KEYS_AT_ONCE))
    with jax.enable_x64(False):  # its arithmetic of indices fails in the 64-bit mode
        scaled = query.astype(jnp.float32) * scale  # in float32 the kernel sums its result in float32, too
        call = lambda: kernel(
            scaled,
            key_pages,
            value_pages,
            lengths,
            page_indices,
            attn_logits_soft_cap=soft_cap,
            pages_per_compute_block=at_once,
        )
        if mode() != "interpret":
            return call().astype(query.dtype)
        with pltpu.force_tpu_interpret_mode():
            return call().astype(query.dtype)


@lowering(_NAME, when=choice.required, priority=8)
def refuse_paged_attention(query, key_pages, value_pages, lengths, page_indices, scale, soft_cap=None):
    """The error of ``torchax.config.pallas = "required"`` for calls that no kernel takes."""
    raise choice.unavailable(query, key_pages, value_pages, lengths, page_indices)


__all__ = ["paged_attention"]
