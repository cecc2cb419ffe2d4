"""Attention by the kernel that serves the call, both ways in 32-bit mode: index arithmetic of kernels fails in the 64-bit one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .masked import masked_attention
from .splash import Band, splash_attention


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
    seed: jax.Array | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Attention over ``[batch, heads, length, features]``: see `masked_attention` and `splash_attention`."""
    if dropout and mask is None:
        mask = jnp.ones((1, key.shape[2]), jnp.int8)
    options: dict[str, Any] = {"causal": causal, "scale": scale, "interpret": interpret}

    def attend(query, key, value, *rest):
        if rest:
            mask, *seeds = rest
            return masked_attention(query, key, value, mask, dropout=dropout, seed=(*seeds, None)[0], **options)
        return splash_attention(
            query, key, value, band=Band(None, 0 if causal else None), scale=scale, interpret=interpret
        )

    return _narrow(attend)(query, key, value, *(x for x in (mask, seed if dropout else None) if x is not None))


def banded_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """`splash_attention` with its options and statistics; `documents` are ``[L]`` or ``[batch, L]``, of any integers."""

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, *ids: jax.Array) -> Any:
        found = (*ids, None)[0]
        return splash_attention(query, key, value, documents=found, statistics=True, **options)

    ids = () if documents is None else (jnp.broadcast_to(_numbered(documents), (query.shape[0], query.shape[2])),)
    return _narrow(attend)(query, key, value, *ids)


def _numbered(documents: jax.Array) -> jax.Array:
    """Numbers of 32 bits, equal where those of the documents are."""
    if documents.dtype.itemsize < 4 or documents.dtype == jnp.int32:
        return documents.astype(jnp.int32)
    rank = lambda row: jnp.searchsorted(jnp.sort(row), row).astype(jnp.int32)
    return rank(documents) if documents.ndim == 1 else jax.vmap(rank)(documents)


def _narrow(function: Any) -> Any:
    """`function` of arrays, traced in 32-bit mode, and its gradient, too."""

    @jax.custom_vjp
    def call(*operands: jax.Array) -> Any:
        with jax.enable_x64(False):
            return function(*operands)

    def forward(*operands: Any) -> Any:
        perturbed = [o.perturbed for o in operands]
        values = [o.value for o in operands]

        def of_perturbed(*chosen: jax.Array) -> jax.Array:
            given = iter(chosen)
            return function(*(next(given) if p else v for p, v in zip(perturbed, values, strict=True)))

        with jax.enable_x64(False):
            out, pull = jax.vjp(of_perturbed, *(v for v, p in zip(values, perturbed, strict=True) if p))
        return out, (pull, tuple(() if p else None for p in perturbed))

    def backward(saved: Any, grad: Any) -> Any:
        pull, perturbed = saved
        leaves, tree = jax.tree.flatten(grad, is_leaf=lambda g: isinstance(g, jax.custom_derivatives.SymbolicZero))
        zero = [isinstance(g, jax.custom_derivatives.SymbolicZero) for g in leaves]
        if all(zero):
            return tuple(None for _ in perturbed)
        grad = tree.unflatten([jnp.zeros(g.shape, g.dtype) if z else g for g, z in zip(leaves, zero, strict=True)])
        with jax.enable_x64(False):
            found = iter(pull(grad))
        return tuple(None if p is None else next(found) for p in perturbed)

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call
