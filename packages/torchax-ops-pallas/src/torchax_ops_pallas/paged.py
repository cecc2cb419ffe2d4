"""Attention of a decoding step over a cache of keys and values in pages: the operator, its meaning, and the kernel's lowering.

The kernel is JAX's, `jax.experimental.pallas.ops.tpu.paged_attention`; it reads the pages where they lie, and rounds them to bfloat16.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax.ops import lowering

from .conditions import Choice
from .pages import check_dtypes, check_ranks, check_soft_cap, refuse_gradient, unfit
from .settings import mode

# Kernels are imported where they are used: Pallas takes longer to import than all of torchax.
_SHORT = "paged_attention"
_NAME = f"torchax::{_SHORT}"
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
        lengths: ``[sequences]``, int32: how many keys each sequence has.
        page_indices: ``[sequences, pages of a sequence]``, int32: entries beyond a sequence's length may be anything, -1, say.
        scale: factor of the scores; None for ``features ** -0.5``.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``; None leaves them.

    Returns:
        ``[sequences, heads, features]`` in the dtype of `query`; zeros for a sequence of no keys.

    Raises:
        ValueError: shapes do not fit each other, or `soft_cap` is not positive.
        TypeError: of the dtypes.
    """
    _check(query, key_pages, value_pages, lengths, page_indices, soft_cap)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.torchax.paged_attention(query, key_pages, value_pages, lengths, page_indices, scale, soft_cap)


def _check(query: Any, key_pages: Any, value_pages: Any, lengths: Any, page_indices: Any, soft_cap: Any) -> None:
    check_ranks(
        _SHORT, query=(query, 3), key_pages=(key_pages, 4), lengths=(lengths, 1), page_indices=(page_indices, 2)
    )
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
    check_dtypes(query, key_pages, value_pages, lengths=lengths, page_indices=page_indices)
    check_soft_cap(soft_cap)


@torch.library.impl(_library, "paged_attention", "CompositeExplicitAutograd")
def in_parts(query, key_pages, value_pages, lengths, page_indices, scale, soft_cap=None):
    """The meaning, in torch's ops: each sequence's pages are gathered."""
    sequences, _, features = query.shape
    page_indices = page_indices.clamp(0, key_pages.shape[1] - 1)
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
    weights = scores.masked_fill(~there[:, None, None], torch.finfo(wide).min).softmax(-1)
    values = values.to(wide).masked_fill(~there[:, None, :, None], 0)  # zeros for a sequence of no keys, too
    return (weights @ values).reshape(query.shape).to(query.dtype)


refuse_gradient(_NAME, _library)


# ---------------------------------------------------------------------- kernel
def _unfit(query: Any, key_pages: Any, value_pages: Any, lengths: Any, page_indices: Any, *_: Any) -> str | None:
    """Why the kernel cannot serve the call, whatever the platform; None if it can."""
    return unfit(query, key_pages.shape[2], key_pages, page_indices)


choice = Choice(_SHORT, _unfit, "the kernel", "this one")


@lowering(_NAME, platforms=("tpu",), when=choice.on_tpu, priority=10)
@lowering(_NAME, when=choice.interpreted, priority=9)
def paged_attention_kernel(query, key_pages, value_pages, lengths, page_indices, scale, soft_cap=None):
    """JAX's kernel, on the sequences and key heads that a device has."""
    operands = query, key_pages, value_pages, lengths, page_indices
    return in_kernel(*operands, scale=scale, soft_cap=soft_cap, interpret=mode() == "interpret")


def in_kernel(
    *operands: jax.Array,
    scale: float,
    soft_cap: float | None = None,
    keys_at_once: int = _KEYS_AT_ONCE,
    interpret: Any = False,
) -> jax.Array:
    """`paged_attention` by JAX's kernel: each block of pages is copied into the vector memory while the one before is computed.

    Args:
        operands: as those of `paged_attention`.
        scale: factor of the scores.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``; None leaves them.
        keys_at_once: how many keys a block has at most, but a page.
        interpret: run as plain JAX operations (True), or in the TPU interpreter (its parameters).
    """
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    from .dividing import over_batch_and_heads

    def of_part(query, key_pages, value_pages, lengths, page_indices):
        page_indices = jnp.clip(page_indices, 0, key_pages.shape[1] - 1)
        page_indices, at_once = _in_blocks(page_indices, max(1, keys_at_once // key_pages.shape[2]))
        scaled = query.astype(jnp.float32) * scale  # in float32 the kernel sums its result in float32, too
        with pltpu.force_tpu_interpret_mode(interpret) if interpret else contextlib.nullcontext():
            out = kernel(
                scaled,
                key_pages,
                value_pages,
                lengths,
                page_indices,
                attn_logits_soft_cap=soft_cap,
                pages_per_compute_block=at_once,
            )
        return (out.astype(query.dtype),)

    with jax.enable_x64(False):  # its arithmetic of indices fails in the 64-bit mode
        if not isinstance(interpret, bool):  # the TPU interpreter calls back in order, which a divided call cannot
            return of_part(*operands)[0]
        names = ("bhd", "gnsd", "gnsd", "b", "bm")
        return over_batch_and_heads(of_part, names, ("bhd",), *operands)[0]


def _in_blocks(page_indices: jax.Array, at_once: int) -> tuple[jax.Array, int]:
    """The pages of sequences in equal blocks of at most `at_once`, filled up with page 0, and how many pages a block has."""
    pages = page_indices.shape[1]
    blocks = -(-pages // at_once)
    at_once = -(-pages // blocks)
    return jnp.pad(page_indices, ((0, 0), (0, blocks * at_once - pages))), at_once


REFUSALS = choice.refusals(_NAME)


__all__ = ["paged_attention"]
