"""Attention of a serving step: sequences with any number of new tokens each, over keys and values in pages.

The kernel is JAX's, `jax.experimental.pallas.ops.tpu.ragged_paged_attention`, whose layout of the cache is kept, so that caches can be shared
with JAX programs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax.ops import lowering

from .blocks import LANES
from .conditions import Choice
from .pages import check_dtypes, check_ranks, check_soft_cap, refuse_gradient, unfit

# Kernels are imported where they are used: Pallas takes longer to import than all of torchax.
_SHORT = "ragged_paged_attention"
_NAME = f"torchax::{_SHORT}"
_QUERIES_AT_ONCE = 32
_BYTES_AT_ONCE = 2**21  # of a block of keys and values, of which the vector memory holds two
_INPUTS = "thd", "nspd", "m", "mk", "c", "1"  # dimensions of the operands, as `over_batch_and_heads` names them
_library = torch.library.Library("torchax", "FRAGMENT")
_library.define(
    "ragged_paged_attention(Tensor query, Tensor pages, Tensor lengths, Tensor page_indices, Tensor starts, Tensor count, float scale, "
    "int? window=None, float? soft_cap=None) -> Tensor"
)


def ragged_paged_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    page_indices: torch.Tensor,
    starts: torch.Tensor,
    count: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Causal attention of the newest tokens of each sequence, prompts and single tokens in one batch, over keys and values in pages.

    The queries of sequence ``b`` are rows ``starts[b]`` to ``starts[b + 1]``, and stand at the end of its ``lengths[b]`` positions. Position ``n``
    lies in page ``page_indices[b, n // page_size]``, at ``n % page_size``; keys and values of the new tokens must have been written there.
    A query sees the positions up to its own. Tensors may be on any device; there are no gradients.

    Args:
        query: ``[tokens, heads, features]``, floating point: the tokens of all sequences one after another, and then any others.
        pages: ``[pages, page_size, 2 * key heads, features]``, of the dtype of `query`: keys at even heads, values at odd ones; the number of key
            heads divides that of heads.
        lengths: ``[sequences]``, int32: how many positions each sequence has, with the new ones.
        page_indices: ``[sequences, pages of a sequence]``, int32: entries beyond a sequence's length may be anything, -1, say.
        starts: ``[sequences + 1]``, int32, the first 0, not decreasing.
        count: ``[1]``, int32: only as many sequences are there, and what is said of others is not looked at; None for all.
        scale: factor of the scores; None for ``features ** -0.5``.
        window: a query sees its own position and the ``window - 1`` before; None for all.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``; None leaves them.

    Returns:
        ``[tokens, heads, features]`` in the dtype of `query`; zeros for tokens of no sequence.

    Raises:
        ValueError: shapes do not fit each other, or `window` or `soft_cap` is not positive.
        TypeError: of the dtypes.
    """
    if count is None:
        count = torch.full((1,), len(lengths), dtype=torch.int32, device=lengths.device)
    _check(query, pages, lengths, page_indices, starts, count, window, soft_cap)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.torchax.ragged_paged_attention(
        query, pages, lengths, page_indices, starts, count, scale, window, soft_cap
    )


def _check(query, pages, lengths, page_indices, starts, count, window, soft_cap) -> None:
    check_ranks(
        _SHORT,
        query=(query, 3),
        pages=(pages, 4),
        lengths=(lengths, 1),
        page_indices=(page_indices, 2),
        starts=(starts, 1),
        count=(count, 1),
    )
    both, heads = pages.shape[2], query.shape[1]
    if both % 2 or not both or heads % (both // 2) or query.shape[2] != pages.shape[3]:
        raise ValueError(
            f"queries [tokens, heads, features] {list(query.shape)} do not fit pages [pages, page_size, 2 * key heads, features] "
            f"{list(pages.shape)}: features must be equal, and key heads divide heads"
        )
    if not lengths.shape[0] == page_indices.shape[0] == starts.shape[0] - 1 or tuple(count.shape) != (1,):
        raise ValueError(
            f"lengths, page_indices, starts and count must be of n, n, n + 1 and 1 elements; they are of {lengths.shape[0]}, "
            f"{page_indices.shape[0]}, {starts.shape[0]} and {list(count.shape)}"
        )
    check_dtypes(query, pages, lengths=lengths, page_indices=page_indices, starts=starts, count=count)
    check_soft_cap(soft_cap)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, a query's own position; it is {window}")


@torch.library.impl(_library, "ragged_paged_attention", "CompositeExplicitAutograd")
def in_parts(query, pages, lengths, page_indices, starts, count, scale, window=None, soft_cap=None):
    """The meaning, in torch's ops: one sequence after another, so that the scores of one are held."""
    tokens, _, features = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = (
        query.reshape(tokens, pages.shape[2] // 2, -1, features).permute(1, 2, 0, 3).to(wide)
    )  # [key heads, n, tokens, features]
    rows, out = torch.arange(tokens, dtype=torch.int32, device=query.device), torch.zeros_like(grouped)
    columns = torch.arange(page_indices.shape[1] * pages.shape[1], dtype=torch.int32, device=query.device)
    for n in range(len(lengths)):
        cache = pages[page_indices[n].clamp(0, len(pages) - 1)].flatten(0, 1).to(wide)
        keys, values = (cache[:, i::2].transpose(0, 1)[:, None] for i in (0, 1))
        own = (rows >= starts[n]) & (rows < starts[n + 1]) & (n < count)
        position = (rows - starts[n + 1] + lengths[n])[:, None]
        seen = (
            (columns <= position)
            & (columns > position - (len(columns) + tokens if window is None else window))
            & own[:, None]
        )
        scores = grouped @ keys.transpose(-2, -1) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        weights = scores.masked_fill(~seen, torch.finfo(wide).min).softmax(-1)
        written = (columns < lengths[n])[:, None]  # pages hold anything beyond
        out = torch.where(own[:, None], weights @ values.masked_fill(~written, 0), out)
    return out.permute(2, 0, 1, 3).reshape(query.shape).to(query.dtype)


refuse_gradient(_NAME, _library)


# ---------------------------------------------------------------------- kernel
def _unfit(query: Any, pages: Any, lengths: Any, page_indices: Any, *_: Any) -> str | None:
    """Why the kernel cannot serve the call; None if it can."""
    key_heads = pages.shape[2] // 2
    if not _tiled(key_heads):
        return f"key heads must be 1, 2, 4 or a multiple of 8, they are {key_heads}"
    if key_heads > 1 and query.shape[2] > LANES:
        return f"{key_heads} key heads must be {LANES} wide, they are {query.shape[2]}"
    return unfit(query, pages.shape[1], pages, page_indices)


def _tiled(key_heads: int) -> bool:
    return key_heads in (1, 2, 4) or key_heads % 8 == 0


choice = Choice(_SHORT, _unfit, "the kernel")


# JAX's interpreters do not know all that the kernel does, hence no lowering for "interpret".
@lowering(_NAME, platforms=("tpu",), when=choice.on_tpu, priority=10)
def ragged_paged_attention_kernel(
    query, pages, lengths, page_indices, starts, count, scale, window=None, soft_cap=None
):
    """JAX's kernel, on the key heads that a device has."""
    from .dividing import over_batch_and_heads

    options = {"sm_scale": scale, "sliding_window": window, "soft_cap": soft_cap}
    operands = query, pages, lengths, page_indices, starts, count
    with jax.enable_x64(False):  # its arithmetic of indices fails in the 64-bit mode
        body = lambda *part: (in_kernel(*part, **options),)
        return over_batch_and_heads(body, _INPUTS, ("thd",), *operands, heads_fit=_tiled)[0]


def in_kernel(query, pages, lengths, page_indices, starts, count, **options: Any) -> jax.Array:
    """JAX's kernel: each block of pages is copied into the vector memory while the one before is computed."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as rpa

    tokens, heads, features = query.shape
    _, at_once = rpa.get_min_heads_per_blk(heads, pages.shape[2], query.dtype, pages.dtype)
    page_bytes = pages.shape[1] * at_once * features * pages.dtype.itemsize
    lengths, page_indices, starts, count, inside = _safe(tokens, len(pages), lengths, page_indices, starts, count)
    with jax.default_matmul_precision("default"):  # it knows none above for bfloat16
        out = rpa.ragged_paged_attention(
            query,
            pages,
            lengths,
            page_indices,
            starts,
            count,
            **options,
            num_kv_pages_per_block=max(1, min(page_indices.shape[1], _BYTES_AT_ONCE // page_bytes)),
            num_queries_per_block=min(tokens, _QUERIES_AT_ONCE),
        )
    return jnp.where(inside, out, jnp.zeros_like(out))  # the kernel leaves rows of no sequence as they are


def _safe(tokens: int, pages: int, lengths: Any, page_indices: Any, starts: Any, count: Any) -> Any:
    """Operands that the kernel finishes with, and which rows are of a sequence.

    It waits for what it has begun to read only where it has work, so no sequence may be empty, nor may the last have no query.
    """
    order = jnp.arange(len(starts), dtype=jnp.int32)
    end = starts[jnp.clip(count, 0, len(lengths))]
    starts = jnp.where(order < count, starts, end)
    inside = jnp.arange(tokens, dtype=jnp.int32)[:, None, None] < end
    last = jnp.maximum((starts < end).sum(dtype=jnp.int32, keepdims=True), 1)
    starts = jnp.where(order < last, starts, jnp.maximum(end, 1))
    return jnp.maximum(lengths, 1), jnp.clip(page_indices, 0, pages - 1), starts, last, inside


REFUSALS = choice.refusals(_NAME)


__all__ = ["ragged_paged_attention"]
