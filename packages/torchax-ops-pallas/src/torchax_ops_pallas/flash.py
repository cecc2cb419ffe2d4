"""Flash attention of `jax.experimental.pallas`, both ways in 32-bit mode: its index arithmetic fails in the 64-bit one."""

import functools

import jax
from jax.experimental.pallas.ops.tpu import flash_attention as kernel


def _attend(query, key, value, causal, scale):
    return kernel.flash_attention(query, key, value, causal=causal, sm_scale=scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def flash_attention(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, scale: float) -> jax.Array:
    """Attention over ``[batch, heads, length, features]``; its gradients are kernels, too."""
    with jax.enable_x64(False):
        return _attend(query, key, value, causal, scale)


def _forward(query, key, value, causal, scale):
    return flash_attention(query, key, value, causal, scale), (query, key, value)


def _backward(causal, scale, saved, grad):
    with jax.enable_x64(False):
        return jax.vjp(lambda q, k, v: _attend(q, k, v, causal, scale), *saved)[1](grad)


flash_attention.defvjp(_forward, _backward)
