"""JAX's splash attention behind the calling convention of PyTorch: attention without a mask tensor."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from .blocks import Blocks, attention_blocks, round_up


class _Visible(masks._ComputableMask):
    """Which keys a query sees, computed in the kernel: those that exist, up to its own, not before its window."""

    def __init__(self, shape: tuple[int, int], keys: int, causal: bool, window: int | None):
        self.key = (shape, keys if keys < shape[1] else None, causal, window)

        def visible(rows: Any, columns: Any) -> Any:
            seen = columns < keys
            if causal:
                seen = seen & (columns <= rows)
            if window is not None:
                seen = seen & (rows - columns < window)
            return seen

        super().__init__(shape, visible)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Visible) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Attention without a mask tensor; both ways are kernels, and grouped heads are not repeated.

    Args:
        query: ``[batch, heads, L, E]``.
        key: ``[batch, key heads, S, E]``; the number of key heads divides that of heads.
        value: ``[batch, key heads, S, V]``.
        causal: whether query i sees the keys up to i alone.
        scale: factor of the scores.
        window: with `causal`, how many keys up to its own a query sees; None for all.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``; None leaves them.
        blocks: block sizes; None for those of the table.
        interpret: run as plain JAX operations (True), or in the TPU interpreter (its parameters).

    Returns:
        ``[batch, heads, L, V]`` in the dtype of `query`.
    """
    length, features = query.shape[2:]
    keys = key.shape[2]
    b = blocks or attention_blocks(length, keys, max(features, value.shape[3]))
    rows = round_up(length, int(np.lcm(b.queries, b.backward_queries)))
    columns = round_up(keys, int(np.lcm(b.keys, b.backward_keys)))
    visible = (
        masks.FullMask((rows, columns))
        if not causal and window is None and columns == keys
        else _Visible((rows, columns), keys, causal, window)
    )
    # Index arithmetic of the kernel fails in 64-bit mode; it mixes bfloat16 and float32 operands, whose products
    # must not follow the precision set for float32 ones.
    precision = jax.config.jax_default_matmul_precision if query.dtype == jnp.float32 else "default"  # pyright: ignore[reportAttributeAccessIssue]
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([visible] * query.shape[1]),
        block_sizes=splash.BlockSizes(
            block_q=b.queries,
            block_kv=b.keys,
            block_kv_compute=b.keys,
            block_q_dkv=b.backward_queries,
            block_kv_dkv=b.backward_keys,
            block_kv_dkv_compute=b.backward_keys,
            block_q_dq=b.backward_queries,
            block_kv_dq=b.backward_keys,
        ),
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
    query = (query * jnp.asarray(scale, jnp.float32).astype(query.dtype)) if scale != 1.0 else query
    with jax.default_matmul_precision(precision):
        out: Any = jax.vmap(kernel)(_pad(query, rows), _pad(key, columns), _pad(value, columns))
    return jax.lax.slice_in_dim(out, 0, length, axis=2)


def _pad(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
