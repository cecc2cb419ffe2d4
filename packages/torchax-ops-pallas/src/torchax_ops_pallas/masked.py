"""Flash attention with a mask tensor: our own kernels, since JAX's want the mask of every head and batch in full.

The mask is read block by block where it lies, broadcast dimensions included. Forward as in FlashAttention-2 (Dao 2023,
arXiv:2307.08691, algorithm 1), backward by its algorithm 2 in two kernels. Blocks that reach beyond the lengths hold anything;
what they hold is masked before it is used. Dropout is computed in the kernels, see `dropout`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import reference
from .blocks import LANES, Blocks, attention_blocks
from .dividing import over_batch_and_heads
from .dropout import dense, head_keys
from .masked_kernels import Call, forward_kernel, key_kernel, query_kernel

_IN_FORWARD = ("query", "key", "value", "mask")
_IN_BACKWARD = (*_IN_FORWARD, "out", "row", "row")


def _specs(call: Call, query: jax.Array, value: jax.Array, mask: jax.Array, where: Any) -> dict[str, pl.BlockSpec]:
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
        "head": spec((1, LANES), lambda b, h, i, j: (b, h, 0, 0)),
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


def _run(call: Call, body: Any, names: tuple[str, ...], outputs: tuple[str, ...], *operands: jax.Array) -> Any:
    """`body` on as many heads as a device has."""

    def of_part(query: jax.Array, key: jax.Array, *rest: jax.Array) -> Any:
        return body(call._replace(group=query.shape[1] // key.shape[1]), query, key, *rest)

    if not isinstance(call.interpret, bool):  # the TPU interpreter calls back in order, which a divided call cannot
        return of_part(*operands)
    mask = "".join("1" if n == 1 else d for n, d in zip(operands[3].shape, "bhqk", strict=True))
    inputs = tuple(mask if name == "mask" else name for name in names)
    return over_batch_and_heads(of_part, inputs, outputs, *operands)


def _forward(call: Call, *operands):
    names = ("bhqd", "bgkd", "bgkv", "mask", "bh1l")[: len(operands)]
    return _run(call, _forward_part, names, ("bhqv", "bh1q"), *operands)


def _backward(call: Call, *operands):
    names = ("bhqd", "bgkd", "bgkv", "mask", "bhqv", "bh1q", "bhqv", "bh1l")[: len(operands)]
    return _run(call, _backward_part, names, ("bhqd", "bgkd", "bgkv"), *operands)


def _forward_part(call: Call, query, key, value, mask, *keys_of_heads):
    batch, heads, length, _ = query.shape
    width = value.shape[3]
    s = _specs(call, query, value, mask, lambda *indices: indices)
    return pl.pallas_call(
        functools.partial(forward_kernel, call=call),
        grid=(batch, heads, pl.cdiv(length, call.rows), pl.cdiv(call.keys, call.columns)),
        in_specs=[s[name] for name in (*_IN_FORWARD, *("head" for _ in keys_of_heads))],
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
    )(query, key, value, mask, *keys_of_heads)


def _backward_part(call: Call, query, key, value, mask, out, lse, grad, *keys_of_heads):
    batch, heads, length, features = query.shape
    width = value.shape[3]
    along = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1)[:, :, None]
    operands = (query, key, value, mask, grad, lse, along, *keys_of_heads)
    n_rows, n_columns = pl.cdiv(length, call.rows), pl.cdiv(call.keys, call.columns)
    names = (*_IN_BACKWARD, *("head" for _ in keys_of_heads))
    s = _specs(call, query, value, mask, lambda *indices: indices)
    dq = pl.pallas_call(
        functools.partial(query_kernel, call=call),
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
        functools.partial(key_kernel, call=call),
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(query, key, value, mask, seed, forward: Call, backward: Call):
    return _forward(forward, query, key, value, mask, *_keys_of_heads(query, seed))[0]


def _keys_of_heads(query: jax.Array, seed: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if seed is None else (head_keys(seed, *query.shape[:2]),)


def _attend_forward(query, key, value, mask, seed, forward, backward):
    learned = mask.perturbed
    query, key, value, mask = (x.value for x in (query, key, value, mask))
    seed = None if seed is None else seed.value
    out, lse = _forward(forward, query, key, value, mask, *_keys_of_heads(query, seed))
    return out, (query, key, value, mask, seed, out, lse, () if learned else None)


def _attend_backward(forward, backward, saved, grad):
    query, key, value, mask, seed, out, lse, learned = saved
    d_mask = None
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    if learned is not None:  # as large as the scores of all heads: XLA computes it
        kept = None if seed is None else dense(seed, *query.shape[:3], keys=key.shape[2], p=forward.dropout)
        options = {"causal": forward.causal, "scale": forward.scale, "kept": kept, "dropout": forward.dropout}
        d_mask = jax.vjp(lambda m: reference.attention(query, key, value, m, **options), mask)[1](grad)[0]
    found = _backward(backward, query, key, value, mask, out, lse, grad, *_keys_of_heads(query, seed))
    return *found, d_mask, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
    seed: jax.Array | None = None,
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
        dropout: the probability that a weight is dropped; the others are divided by what is left of 1.
        seed: ``int32[2]``, with dropout: decides which, see `dropout.dense`.
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
    common = (causal, scale, dropout, length, keys, query.shape[1] // key.shape[1])
    return _attend(
        query,
        key,
        value,
        mask,
        seed if dropout else None,
        Call(*common, b.queries, b.keys, interpret),
        Call(*common, b.backward_queries, b.backward_keys, interpret),
    )
