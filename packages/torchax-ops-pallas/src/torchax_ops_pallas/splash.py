"""JAX's splash attention behind the calling convention of PyTorch: attention without a mask tensor."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.xla_metadata import set_xla_metadata

from .blocks import Blocks, attention_blocks, round_up
from .dividing import over_batch_and_heads


class Band(NamedTuple):
    """Query i sees key j if ``-right <= i - j <= left`` or ``j < prefix``; None is no bound. Causal attention is ``Band(None, 0)``."""

    left: int | None = None
    right: int | None = None
    prefix: int = 0

    def pairs(self, length: int, keys: int) -> int:
        """How many pairs of a query and a key that it sees there are."""
        rows = np.arange(length)
        first = np.zeros_like(rows) if self.left is None else np.maximum(rows - self.left, 0)
        end = np.full_like(rows, keys) if self.right is None else np.minimum(rows + self.right + 1, keys)
        prefix = min(self.prefix, keys)
        return int((np.maximum(end - np.maximum(first, prefix), 0) + prefix).sum())


class _Visible(masks._ComputableMask):
    """Which keys a query sees, computed in the kernel: those that exist, in the band."""

    def __init__(self, shape: tuple[int, int], keys: int, band: Band):
        self.key = (shape, keys if keys < shape[1] else None, band)

        def visible(rows: Any, columns: Any) -> Any:
            seen = columns < keys
            if band.right is not None:
                seen = seen & (columns - rows <= band.right)
            if band.left is not None:
                seen = seen & (rows - columns <= band.left)
            return seen | (columns < min(band.prefix, keys)) if band.prefix else seen

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
    band: Band,
    scale: float,
    soft_cap: float | None = None,
    documents: jax.Array | None = None,
    statistics: bool = False,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Any:
    """Attention without a mask tensor; both ways are kernels, and grouped heads are not repeated.

    Args:
        query: ``[batch, heads, L, E]``.
        key: ``[batch, key heads, S, E]``; the number of key heads divides that of heads.
        value: ``[batch, key heads, S, V]``.
        band: which keys a query sees; at least one.
        scale: factor of the scores.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``; None leaves them.
        documents: ``int32[batch, L]``, where there are as many keys as queries: queries see keys of the same number alone.
        statistics: give the logarithm of the sum of exponentials of each query's scores, too, which may have gradients.
        blocks: block sizes; None for those of the table.
        interpret: run as plain JAX operations (True), or in the TPU interpreter (its parameters).

    Returns:
        ``[batch, heads, L, V]`` in the dtype of `query`; with `statistics` also ``float32[batch, heads, L]``.
    """
    length, features = query.shape[2:]
    keys = key.shape[2]
    b = blocks or attention_blocks(length, keys, max(features, value.shape[3]))
    rows = round_up(length, int(np.lcm(b.queries, b.backward_queries)))
    columns = round_up(keys, int(np.lcm(b.keys, b.backward_keys)))
    visible = (
        masks.FullMask((rows, columns)) if band == Band() and columns == keys else _Visible((rows, columns), keys, band)
    )
    # The kernel mixes bfloat16 and float32 operands, whose products must not follow the precision set for float32 ones.
    precision = jax.config.jax_default_matmul_precision if query.dtype == jnp.float32 else "default"  # pyright: ignore[reportAttributeAccessIssue]
    call = _Call(visible, band.pairs(length, keys), b, soft_cap, statistics, precision, interpret)
    query = (query * jnp.asarray(scale, jnp.float32).astype(query.dtype)) if scale != 1.0 else query
    # queries beyond the length see what the last one sees: somebody must be seen
    pad_ids = lambda ids, n: jnp.pad(ids, ((0, 0), (0, n - length)), mode="edge")
    ids = () if documents is None else (pad_ids(documents, rows), pad_ids(documents, columns))
    found: Any = _attend(call, (_pad(query, rows), _pad(key, columns), _pad(value, columns), *ids))
    out, *lse = (jax.lax.slice_in_dim(x, 0, length, axis=2) for x in found)
    return (out, *lse) if statistics else out


class _Call(NamedTuple):
    """What is compiled in; `pairs` of queries and keys see each other."""

    visible: Any
    pairs: int
    blocks: Blocks
    soft_cap: float | None
    statistics: bool
    precision: Any
    interpret: Any

    def kernel(self, heads: int, save_residuals: bool = False) -> splash.SplashAttentionKernel:
        """JAX's kernel of one batch."""
        b = self.blocks
        return splash.make_splash_mha_single_device(
            masks.MultiHeadMask([self.visible] * heads),
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
            attn_logits_soft_cap=self.soft_cap,
            save_residuals=save_residuals,
            interpret=self.interpret,
        )


def _run(
    call: _Call, body: Any, inputs: tuple[str, ...], outputs: tuple[str, ...], products: float, *operands: jax.Array
) -> Any:
    """`body`, of one batch, on the batches and heads that a device has; each kernel in it computes `products` products of matrices."""

    def precise(query: jax.Array, *rest: jax.Array) -> Any:
        batches, heads, _, features = query.shape
        flops = int(2 * products * features * batches * heads * call.pairs)
        with jax.default_matmul_precision(call.precision), set_xla_metadata(torchax_flops=str(flops)):
            return jax.vmap(body)(query, *rest)

    if not isinstance(call.interpret, bool):  # the TPU interpreter calls back in order, which a divided call cannot
        return precise(*operands)
    return over_batch_and_heads(precise, inputs, outputs, *operands)


_QKV = ("bhqd", "bgkd", "bgkv")


def _segments(ids: tuple[jax.Array, ...]) -> splash.SegmentIds | None:
    return splash.SegmentIds(*ids) if ids else None


def _forward(call: _Call, *operands: jax.Array) -> Any:
    def splash_forward(query: Any, key: Any, value: Any, *ids: Any) -> Any:
        out, (lse,) = call.kernel(query.shape[0], save_residuals=True)(query, key, value, _segments(ids))
        return out, lse

    inputs = (*_QKV, "bq", "bk")[: len(operands)]
    return _run(call, splash_forward, inputs, ("bhqv", "bhq"), 2, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    def splash_attention(query: Any, key: Any, value: Any, *ids: Any) -> Any:
        return (call.kernel(query.shape[0])(query, key, value, _segments(ids)),)

    if call.statistics:
        return _forward(call, *operands)
    inputs = (*_QKV, "bq", "bk")[: len(operands)]
    return _run(call, splash_attention, inputs, ("bhqv",), 2, *operands)


def _attend_forward(call: _Call, operands: tuple[jax.Array, ...]) -> Any:
    out, lse = _forward(call, *operands)
    return (out, lse) if call.statistics else (out,), (operands, out, lse)


def _attend_backward(call: _Call, saved: Any, grads: tuple[jax.Array, ...]) -> Any:
    operands, out, lse = saved

    def splash_backward(query: Any, key: Any, value: Any, lse: Any, grad: Any, along: Any, *ids: Any) -> Any:
        return _gradients(call.kernel(query.shape[0]), query, key, value, _segments(ids), lse, grad, along)

    # the gradient of a score is its weight times (that of the weight - along); the logarithm's adds to it
    along = (out.astype(jnp.float32) * grads[0].astype(jnp.float32)).sum(-1)
    if call.statistics:
        along = along - grads[1]
    query, key, value, *ids = operands
    inputs = (*_QKV, "bhq", "bhqv", "bhq", "bq", "bk")[: len(operands) + 3]
    # dq takes three products, dk and dv take four
    found = _run(call, splash_backward, inputs, _QKV, 3.5, query, key, value, lse, grads[0], along, *ids)
    return ((*found, *(None for _ in ids)),)


_attend.defvjp(_attend_forward, _attend_backward)


def _gradients(kernel: Any, query: Any, key: Any, value: Any, segments: Any, lse: Any, grad: Any, along: Any) -> Any:
    """As JAX's own backward of the kernel, which has no way in for gradients of `lse`."""
    o, sizes = kernel.kwargs, kernel.kwargs["block_sizes"]
    operands = (query, key, value, segments, None, lse, grad, along)
    common = {
        "is_mqa": o["is_mqa"],
        "mask_value": o["mask_value"],
        "attn_logits_soft_cap": o["attn_logits_soft_cap"],
        "q_layout": sizes.q_layout,
        "k_layout": sizes.k_layout,
        "v_layout": sizes.v_layout,
        "mask_function": o["mask_function"],
        "interpret": o["interpret"],
    }
    _, dk, dv = splash._splash_attention_bwd_dkv(
        *operands,
        bq=sizes.block_q_dkv,
        bkv=sizes.block_kv_dkv,
        bkv_compute=sizes.block_kv_dkv_compute,
        mask_info=kernel.dkv_mask_info,
        use_fused_bwd_kernel=False,
        **common,
    )
    dq = splash._splash_attention_bwd_dq(
        *operands, bq=sizes.block_q_dq, bkv=sizes.block_kv_dq, mask_info=kernel.dq_mask_info, **common
    )
    return dq, dk, dv


def _pad(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
