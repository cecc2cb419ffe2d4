"""Flash attention with a mask tensor: our own kernels, since JAX's want the mask of every head and batch in full.

The mask is read block by block where it lies, broadcast dimensions included. Forward as in FlashAttention-2 (Dao 2023,
arXiv:2307.08691, algorithm 1), backward by its algorithm 2 in two kernels. Blocks that reach beyond the lengths hold anything;
what they hold is masked before it is used.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import reference
from .blocks import LANES, Blocks, attention_blocks
from .dividing import over_batch_and_heads

_ABT = (((1,), (1,)), ((), ()))  # a @ b.T
_AB = (((1,), (0,)), ((), ()))
_ATB = (((0,), (0,)), ((), ()))


class _Call(NamedTuple):
    """What is compiled in."""

    causal: bool
    scale: float
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


def _scores(call: _Call, i: Any, j: Any, query: jax.Array, key: jax.Array, mask_ref: Any) -> jax.Array:
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


def _visible(call: _Call, i: Any, j: Any) -> Any:
    """Whether block (i, j) holds anything on or below the diagonal."""
    return (j * call.columns < (i + 1) * call.rows) if call.causal else True


def _forward_kernel(q_ref, k_ref, v_ref, mask_ref, out_ref, lse_ref, top_ref, sum_ref, acc_ref, *, call: _Call):
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
        total = sum_ref[...][:, :1] * shrink + weights.sum(axis=1, keepdims=True)
        acc_ref[...] = acc_ref[...] * shrink + _dot(weights.astype(value.dtype), value, _AB)
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


def _weights_and_gradient(call: _Call, i: Any, j: Any, q_ref, k_ref, v_ref, mask_ref, grad_ref, lse_ref, along_ref):
    """Of block (i, j): queries, keys and gradients that exist, the weights and the gradient of the scores."""
    query = _existing(q_ref[...], i * call.rows, call.length)
    key = _existing(k_ref[...], j * call.columns, call.keys)
    value = _existing(v_ref[...], j * call.columns, call.keys)
    grad = _existing(grad_ref[...], i * call.rows, call.length)
    lse = jnp.broadcast_to(lse_ref[...], (LANES, call.rows)).T[:, :1]
    along = jnp.broadcast_to(along_ref[...], (LANES, call.rows)).T[:, :1]
    scores = _scores(call, i, j, query, key, mask_ref)
    weights = jnp.where(scores == -jnp.inf, 0.0, jnp.exp(scores - lse))
    slope = jnp.where(scores == -jnp.inf, 0.0, weights * (_dot(grad, value, _ABT) - along)) * call.scale
    return query, key, grad, weights, slope


def _query_kernel(q_ref, k_ref, v_ref, mask_ref, grad_ref, lse_ref, along_ref, dq_ref, acc_ref, *, call: _Call):
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(_visible(call, i, j))
    def _():
        _, key, _, _, slope = _weights_and_gradient(
            call, i, j, q_ref, k_ref, v_ref, mask_ref, grad_ref, lse_ref, along_ref
        )
        acc_ref[...] += _dot(slope.astype(key.dtype), key, _AB)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = acc_ref[...].astype(dq_ref.dtype)


def _key_kernel(
    q_ref, k_ref, v_ref, mask_ref, grad_ref, lse_ref, along_ref, dk_ref, dv_ref, dk_acc, dv_acc, *, call: _Call
):
    j, t = pl.program_id(2), pl.program_id(3)
    i = lax.rem(t, pl.cdiv(call.length, call.rows))

    @pl.when(t == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(_visible(call, i, j))
    def _():
        query, _, grad, weights, slope = _weights_and_gradient(
            call, i, j, q_ref, k_ref, v_ref, mask_ref, grad_ref, lse_ref, along_ref
        )
        dv_acc[...] += _dot(weights.astype(grad.dtype), grad, _ATB)
        dk_acc[...] += _dot(slope.astype(query.dtype), query, _ATB)

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
        dk_ref[...] = dk_acc[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def _specs(call: _Call, query: jax.Array, value: jax.Array, mask: jax.Array, where: Any) -> dict[str, pl.BlockSpec]:
    """Block specifications; ``where(grid indices)`` gives batch, query head, block of queries, block of keys."""

    def spec(shape: tuple[int, int], pick: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda *indices: pick(*where(*indices)))

    features, width = query.shape[3], value.shape[3]
    b0, h0, i0 = (n == 1 for n in mask.shape[:3])
    of_queries = lambda b, h, i, j: (b, h, i, 0)
    of_keys = lambda b, h, i, j: (b, lax.div(h, call.group), j, 0)
    return {
        "query": spec((call.rows, features), of_queries),
        "key": spec((call.columns, features), of_keys),
        "value": spec((call.columns, width), of_keys),
        "mask": spec(
            (1 if i0 else call.rows, call.columns),
            lambda b, h, i, j: (0 if b0 else b, 0 if h0 else h, 0 if i0 else i, j),
        ),
        "out": spec((call.rows, width), of_queries),
        "row": spec((1, call.rows), lambda b, h, i, j: (b, h, 0, i)),
    }


def _params(parallel: int, sequential: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential)


def _cost(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, products: int) -> pl.CostEstimate:
    batch, heads, length, features = query.shape
    pairs = batch * heads * length * key.shape[2]
    moved = sum(x.size * x.dtype.itemsize for x in (query, key, value, mask))
    return pl.CostEstimate(
        flops=products * pairs * (features + value.shape[3]),
        transcendentals=pairs,
        bytes_accessed=moved + query.size * query.dtype.itemsize,
    )


def _run(call: _Call, body: Any, names: tuple[str, ...], outputs: tuple[str, ...], *operands: jax.Array) -> Any:
    """`body` on as many heads as a device has."""

    def of_part(query: jax.Array, key: jax.Array, *rest: jax.Array) -> Any:
        return body(call._replace(group=query.shape[1] // key.shape[1]), query, key, *rest)

    if not isinstance(call.interpret, bool):  # the TPU interpreter calls back in order, which a divided call cannot
        return of_part(*operands)
    mask = "".join("1" if n == 1 else d for n, d in zip(operands[3].shape, "bhqk", strict=True))
    inputs = tuple(mask if name == "mask" else name for name in names)
    return over_batch_and_heads(of_part, inputs, outputs, *operands)


def _forward(call: _Call, query, key, value, mask):
    names = ("bhqd", "bgkd", "bgkv", "mask")
    return _run(call, _forward_part, names, ("bhqv", "bh1q"), query, key, value, mask)


def _backward(call: _Call, *operands):
    names = ("bhqd", "bgkd", "bgkv", "mask", "bhqv", "bh1q", "bhqv")
    return _run(call, _backward_part, names, ("bhqd", "bgkd", "bgkv"), *operands)


def _forward_part(call: _Call, query, key, value, mask):
    batch, heads, length, _ = query.shape
    width = value.shape[3]
    s = _specs(call, query, value, mask, lambda *indices: indices)
    return pl.pallas_call(
        functools.partial(_forward_kernel, call=call),
        grid=(batch, heads, pl.cdiv(length, call.rows), pl.cdiv(call.keys, call.columns)),
        in_specs=[s["query"], s["key"], s["value"], s["mask"]],
        out_specs=[s["out"], s["row"]],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, length, width), query.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((call.rows, LANES), jnp.float32),
            pltpu.VMEM((call.rows, LANES), jnp.float32),
            pltpu.VMEM((call.rows, width), jnp.float32),
        ],
        compiler_params=_params(3, 1),
        cost_estimate=_cost(query, key, value, mask, 2),
        interpret=call.interpret,
        name="masked_attention",
    )(query, key, value, mask)


def _backward_part(call: _Call, query, key, value, mask, out, lse, grad):
    batch, heads, length, features = query.shape
    width = value.shape[3]
    along = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1)[:, :, None]
    operands = (query, key, value, mask, grad, lse, along)
    n_rows, n_columns = pl.cdiv(length, call.rows), pl.cdiv(call.keys, call.columns)
    names = ("query", "key", "value", "mask", "out", "row", "row")
    s = _specs(call, query, value, mask, lambda *indices: indices)
    dq = pl.pallas_call(
        functools.partial(_query_kernel, call=call),
        grid=(batch, heads, n_rows, n_columns),
        in_specs=[s[name] for name in names],
        out_specs=s["query"],
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch_shapes=[pltpu.VMEM((call.rows, features), jnp.float32)],
        compiler_params=_params(3, 1),
        cost_estimate=_cost(query, key, value, mask, 3),
        interpret=call.interpret,
        name="masked_attention_dq",
    )(*operands)
    s = _specs(
        call,
        query,
        value,
        mask,
        lambda b, h, j, t: (b, h * call.group + lax.div(t, n_rows), lax.rem(t, n_rows), j),
    )
    dk, dv = pl.pallas_call(
        functools.partial(_key_kernel, call=call),
        grid=(batch, key.shape[1], n_columns, call.group * n_rows),
        in_specs=[s[name] for name in names],
        out_specs=[s["key"], s["value"]],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        scratch_shapes=[pltpu.VMEM((call.columns, n), jnp.float32) for n in (features, width)],
        compiler_params=_params(3, 1),
        cost_estimate=_cost(query, key, value, mask, 4),
        interpret=call.interpret,
        name="masked_attention_dkv",
    )(*operands)
    return dq, dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, forward: _Call, backward: _Call):
    return _forward(forward, query, key, value, mask)[0]


def _attend_forward(query, key, value, mask, forward, backward):
    learned = mask.perturbed
    query, key, value, mask = (x.value for x in (query, key, value, mask))
    out, lse = _forward(forward, query, key, value, mask)
    return out, (query, key, value, mask, out, lse, () if learned else None)


def _attend_backward(forward, backward, saved, grad):
    query, key, value, mask, out, lse, learned = saved
    d_mask = None
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    if learned is not None:  # as large as the scores of all heads: XLA computes it
        plain = lambda m: reference.attention(query, key, value, m, causal=forward.causal, scale=forward.scale)
        d_mask = jax.vjp(plain, mask)[1](grad)[0]
    return *_backward(backward, query, key, value, mask, out, lse, grad), d_mask


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    causal: bool,
    scale: float,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Attention with a mask tensor; both ways are kernels, and grouped heads are not repeated.

    Args:
        query: ``[batch, heads, L, E]``.
        key: ``[batch, key heads, S, E]``; the number of key heads divides that of heads.
        value: ``[batch, key heads, S, V]``.
        mask: bool (True: seen) or added to the scores, ``[L or 1, S]`` behind up to two dimensions that broadcast.
        causal: whether query i sees, besides, the keys up to i alone.
        scale: factor of the scores.
        blocks: block sizes; None for those of the table.
        interpret: run as plain JAX operations (True), or in the TPU interpreter (its parameters).

    Returns:
        ``[batch, heads, L, V]`` in the dtype of `query`; zeros where a query sees nothing.
    """
    length, keys = query.shape[2], key.shape[2]
    b = blocks or attention_blocks(length, keys, max(query.shape[3], value.shape[3]))
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.dtype == jnp.bool_:  # a kernel would be given 32 bits for each
        mask = mask.astype(jnp.int8)
    common = (causal, scale, length, keys, query.shape[1] // key.shape[1])
    return _attend(
        query,
        key,
        value,
        mask,
        _Call(*common, b.queries, b.keys, interpret),
        _Call(*common, b.backward_queries, b.backward_keys, interpret),
    )
