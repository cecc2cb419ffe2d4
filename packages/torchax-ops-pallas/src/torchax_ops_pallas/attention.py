"""Fused softmax attention for key lengths whose keys and values fit into the vector memory.

One grid step takes a block of queries and all keys and values of its head: the scores never leave the chip. The
gradient is the reference's, computed by XLA from the inputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import reference
from .lowerings import BLOCK


def _kernel(query_ref, key_ref, value_ref, out_ref, *, causal: bool, scale: float):
    query, key, value = query_ref[0], key_ref[0], value_ref[0]
    scores = lax.dot_general(query, key, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
    if causal:
        first = pl.program_id(1) * query.shape[0]
        rows = first + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        columns = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(columns <= rows, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    total = weights.sum(axis=1, keepdims=True)
    out = jnp.dot(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    out_ref[0] = (out / total).astype(out_ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def fused_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, scale: float, interpret: bool = False
) -> jax.Array:
    """Attention over ``[batch, heads, length, features]``.

    Args:
        query: ``[batch, heads, L, E]``, L a multiple of `BLOCK`.
        key: ``[batch, heads, S, E]``.
        value: ``[batch, heads, S, V]``.
        causal: whether query i sees the keys up to i alone.
        scale: factor of the scores.
        interpret: run as plain JAX operations, for tests off the chip.

    Returns:
        ``[batch, heads, L, V]`` in the dtype of `query`.
    """
    batch, heads, length, features = query.shape
    keys, width = value.shape[2:]
    n = batch * heads

    def whole(i, j):
        return i, 0, 0

    out = pl.pallas_call(
        functools.partial(_kernel, causal=causal, scale=scale),
        grid=(n, length // BLOCK),
        in_specs=[
            pl.BlockSpec((1, BLOCK, features), lambda i, j: (i, j, 0)),
            pl.BlockSpec((1, keys, features), whole),
            pl.BlockSpec((1, keys, width), whole),
        ],
        out_specs=pl.BlockSpec((1, BLOCK, width), lambda i, j: (i, j, 0)),
        out_shape=jax.ShapeDtypeStruct((n, length, width), query.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * length * keys * (features + width),
            transcendentals=n * length * keys,
            bytes_accessed=(query.size + key.size + value.size + n * length * width) * query.dtype.itemsize,
        ),
        interpret=interpret,
    )(query.reshape(n, length, features), key.reshape(n, keys, features), value.reshape(n, keys, width))
    return out.reshape(batch, heads, length, width)


def _fused_forward(query, key, value, causal, scale, interpret):
    return fused_attention(query, key, value, causal, scale, interpret), (query, key, value)


def _fused_backward(causal, scale, interpret, saved, grad):
    return jax.vjp(lambda q, k, v: reference.attention(q, k, v, causal, scale), *saved)[1](grad)


fused_attention.defvjp(_fused_forward, _fused_backward)
