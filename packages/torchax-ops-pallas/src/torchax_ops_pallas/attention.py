"""Attention by the kernel that serves the call, both ways in 32-bit mode: index arithmetic of kernels fails in the 64-bit one."""

from __future__ import annotations

import functools
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


def banded_attention(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    """`splash_attention`, with its options."""
    return _narrow(functools.partial(splash_attention, **options))(query, key, value)


def _narrow(function: Any) -> Any:
    """`function` of arrays, traced in 32-bit mode, and its gradient, too."""

    @jax.custom_vjp
    def call(*operands: jax.Array) -> jax.Array:
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
        if isinstance(grad, jax.custom_derivatives.SymbolicZero):
            return tuple(None for _ in perturbed)
        with jax.enable_x64(False):
            found = iter(pull(grad))
        return tuple(None if p is None else next(found) for p in perturbed)

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call
