"""What the kernels of `masked` compute in a block of queries and keys: the forward, and the backward in two parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .blocks import LANES
from .dropout import kept

_ABT = (((1,), (1,)), ((), ()))  # a @ b.T
_AB = (((1,), (0,)), ((), ()))
_ATB = (((0,), (0,)), ((), ()))


class Call(NamedTuple):
    """What is compiled in; `dropout` is the probability that a weight is dropped."""

    causal: bool
    scale: float
    dropout: float
    length: int
    keys: int
    group: int  # query heads of a key head
    rows: int  # block of queries
    columns: int  # block of keys
    interpret: Any


def _dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _existing(x: jax.Array, first: Any, length: int) -> jax.Array:
    """The rows that exist; zeros in place of what lies beyond the array."""
    if length % x.shape[0] == 0:
        return x
    rows = first + lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(rows < length, x, jnp.zeros_like(x))


def _scores(call: Call, i: Any, j: Any, query: jax.Array, key: jax.Array, mask_ref: Any) -> jax.Array:
    """Masked scores of block (i, j), minus infinity where there is nothing to see."""
    scores = _dot(query, key, _ABT) * call.scale
    mask = mask_ref[...]
    if mask.dtype == jnp.int8:
        scores = jnp.where(jnp.broadcast_to(mask.astype(jnp.int32), scores.shape) != 0, scores, -jnp.inf)
    else:
        scores = scores + mask.astype(jnp.float32)
    rows = i * call.rows + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    columns = j * call.columns + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = columns < call.keys
    if call.length % call.rows:
        seen = seen & (rows < call.length)
    if call.causal:
        seen = seen & (columns <= rows)
    return jnp.where(seen, scores, -jnp.inf)


def _operands(call: Call, n: int, refs: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, tuple[Any, ...]]:
    """The first `n` of the kernel's references, that of the head's keys if there is dropout, and the rest."""
    return (refs[:n], refs[n], refs[n + 1 :]) if call.dropout else (refs[:n], None, refs[n:])


def _dropout(call: Call, i: Any, j: Any, keys_ref: Any) -> Any:
    """What drops weights of block (i, j), or their gradients, and scales those that are kept."""
    if not call.dropout:
        return lambda x: x
    keep = kept(keys_ref[...], i * call.rows, j * call.columns, call.rows, call.columns, call.dropout)
    return lambda x: jnp.where(keep, x * (1 / (1 - call.dropout)), 0.0)


def _visible(call: Call, i: Any, j: Any) -> Any:
    """Whether block (i, j) holds anything on or below the diagonal."""
    return (j * call.columns < (i + 1) * call.rows) if call.causal else True


def forward_kernel(*refs: Any, call: Call) -> None:
    """Output and logsumexp of a block of queries; sequential over blocks of keys."""
    (q_ref, k_ref, v_ref, mask_ref), keys_ref, rest = _operands(call, 4, refs)
    out_ref, lse_ref, top_ref, sum_ref, acc_ref = rest
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(_visible(call, i, j))
    def _():
        value = _existing(v_ref[...], j * call.columns, call.keys)
        scores = _scores(call, i, j, q_ref[...], k_ref[...], mask_ref)
        before = top_ref[...][:, :1]
        top = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        finite = jnp.where(top == -jnp.inf, 0.0, top)
        weights = jnp.exp(scores - finite)
        shrink = jnp.exp(before - finite)
        drop = _dropout(call, i, j, keys_ref)
        total = sum_ref[...][:, :1] * shrink + weights.sum(axis=1, keepdims=True)
        acc_ref[...] = acc_ref[...] * shrink + _dot(drop(weights).astype(value.dtype), value, _AB)
        top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
        sum_ref[...] = jnp.broadcast_to(total, sum_ref.shape)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        total = sum_ref[...]
        empty = total == 0.0  # masked everywhere: zeros, with zero gradients
        divisor = jnp.where(empty, 1.0, total)
        out_ref[...] = (acc_ref[...] / divisor[:, :1]).astype(out_ref.dtype)
        lse = jnp.where(empty, jnp.inf, jnp.log(divisor) + top_ref[...])
        lse_ref[...] = lse.T[:1]


def _weights_and_gradient(call: Call, i: Any, j: Any, inputs: tuple[Any, ...], keys_ref: Any):
    """Of block (i, j): queries, keys and gradients that exist, the weights after dropout and the gradient of the scores."""
    q_ref, k_ref, v_ref, mask_ref, grad_ref, lse_ref, along_ref = inputs
    query = _existing(q_ref[...], i * call.rows, call.length)
    key = _existing(k_ref[...], j * call.columns, call.keys)
    value = _existing(v_ref[...], j * call.columns, call.keys)
    grad = _existing(grad_ref[...], i * call.rows, call.length)
    lse = jnp.broadcast_to(lse_ref[...], (LANES, call.rows)).T[:, :1]
    along = jnp.broadcast_to(along_ref[...], (LANES, call.rows)).T[:, :1]
    scores = _scores(call, i, j, query, key, mask_ref)
    weights = jnp.where(scores == -jnp.inf, 0.0, jnp.exp(scores - lse))
    drop = _dropout(call, i, j, keys_ref)
    slope = jnp.where(scores == -jnp.inf, 0.0, weights * (drop(_dot(grad, value, _ABT)) - along)) * call.scale
    return query, key, grad, drop(weights), slope


def query_kernel(*refs: Any, call: Call) -> None:
    """The gradient of a block of queries; sequential over blocks of keys."""
    inputs, keys_ref, (dq_ref, acc_ref) = _operands(call, 7, refs)
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(_visible(call, i, j))
    def _():
        _, key, _, _, slope = _weights_and_gradient(call, i, j, inputs, keys_ref)
        acc_ref[...] += _dot(slope.astype(key.dtype), key, _AB)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = acc_ref[...].astype(dq_ref.dtype)


def key_kernel(*refs: Any, call: Call) -> None:
    """The gradients of a block of keys and values; sequential over the heads of their group and blocks of queries."""
    inputs, keys_ref, (dk_ref, dv_ref, dk_acc, dv_acc) = _operands(call, 7, refs)
    j, t = pl.program_id(2), pl.program_id(3)
    i = lax.rem(t, pl.cdiv(call.length, call.rows))

    @pl.when(t == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(_visible(call, i, j))
    def _():
        query, _, grad, weights, slope = _weights_and_gradient(call, i, j, inputs, keys_ref)
        dv_acc[...] += _dot(weights.astype(grad.dtype), grad, _ATB)
        dk_acc[...] += _dot(slope.astype(query.dtype), query, _ATB)

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
        dk_ref[...] = dk_acc[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)
