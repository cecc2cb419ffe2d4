"""What the kernels compute, in plain `jax.numpy`: the yardstick of the tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
    scale: float = 1.0,
    window: int | None = None,
    soft_cap: float | None = None,
    kept: jax.Array | None = None,
    dropout: float = 0.0,
) -> jax.Array:
    """``softmax(query @ key.T * scale + mask) @ value``, zeros where a query sees nothing.

    Args:
        query: ``[..., heads, L, E]``.
        key: ``[..., key heads, S, E]``; each key head serves as many consecutive query heads.
        value: ``[..., key heads, S, V]``.
        mask: bool or int8 (nonzero: seen), or added to the scores; broadcast to ``[..., heads, L, S]``.
        causal: query i sees the keys up to i alone.
        scale: factor of the scores.
        window: how many keys up to its own a query sees.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)`` before they are masked.
        kept: bool, like the scores: the weights that dropout keeps; None for all.
        dropout: its probability, by whose rest the weights are divided.

    Returns:
        ``[..., heads, L, V]`` in the dtype of `query`; computed in float32, or float64 if given that.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    group = query.shape[-3] // key.shape[-3]
    key, value = (jnp.repeat(t, group, axis=-3).astype(wide) for t in (key, value))
    scores = jnp.einsum("...le,...se->...ls", query.astype(wide), key, precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if mask is not None:
        seen = mask.dtype in (jnp.bool_, jnp.int8)
        scores = jnp.where(mask.astype(bool), scores, -jnp.inf) if seen else scores + mask.astype(wide)
    rows, columns = (lax.broadcasted_iota(jnp.int32, scores.shape[-2:], i) for i in (0, 1))
    if causal:
        scores = jnp.where(columns <= rows, scores, -jnp.inf)
    if window is not None:
        scores = jnp.where(rows - columns < window, scores, -jnp.inf)
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    if kept is not None:
        weights = jnp.where(kept, weights / (1 - dropout), 0)
    return jnp.einsum("...ls,...sv->...lv", weights, value, precision="highest").astype(query.dtype)


def grouped_matmul(x: jax.Array, matrices: jax.Array, ends: jax.Array) -> jax.Array:
    """``x[ends[g-1]:ends[g]] @ matrices[g]`` for each group g; zeros in rows of no group.

    Args:
        x: ``[rows, K]``.
        matrices: ``[groups, K, N]``.
        ends: ``[groups]``, integers that do not decrease.

    Returns:
        ``[rows, N]`` in the dtype of `x`.
    """
    return jnp.einsum("gr,rk,gkn->rn", _members(x, ends), x, matrices, precision="highest")


def grouped_outer(x: jax.Array, y: jax.Array, ends: jax.Array) -> jax.Array:
    """``x[ends[g-1]:ends[g]].T @ y[ends[g-1]:ends[g]]`` for each group g.

    Args:
        x: ``[rows, K]``.
        y: ``[rows, N]``.
        ends: ``[groups]``, integers that do not decrease.

    Returns:
        ``[groups, K, N]`` in the dtype of `x`.
    """
    return jnp.einsum("gr,rk,rn->gkn", _members(x, ends), x, y, precision="highest")


def _members(x: jax.Array, ends: jax.Array) -> jax.Array:
    """One where a row is of a group, ``[groups, rows]``."""
    row = lax.broadcasted_iota(jnp.int32, (ends.size, x.shape[0]), 1)
    first = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    return ((first[:, None] <= row) & (row < ends[:, None])).astype(x.dtype)
