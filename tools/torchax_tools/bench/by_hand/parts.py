"""What models are made of, as one writes it in JAX."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Weights = dict[str, jax.Array]  # by the names of `named_parameters`
Activation = Callable[[jax.Array], jax.Array]


def linear(w: Weights, name: str, x: jax.Array) -> jax.Array:
    """A layer over the last dimension, with its bias if there is one."""
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def layer_norm(w: Weights, name: str, x: jax.Array, eps: float = 1e-5) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps) * w[name + ".weight"] + w[name + ".bias"]


def rms_norm(w: Weights, name: str, x: jax.Array, eps: float = 1e-6, offset: float = 0.0) -> jax.Array:
    """`offset` is added to the weight: Gemma keeps the difference to 1."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * (w[name + ".weight"] + offset)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """``[batch, length, heads * features]`` as ``[batch, heads, length, features]``."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def join_heads(x: jax.Array) -> jax.Array:
    """The way back from `split_heads`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array | None = None,
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention over ``[batch, heads, length, features]``; key heads may be fewer.

    Args:
        q: queries.
        k: keys.
        v: values.
        seen: ``[queries, keys]``, bool; None if every query sees every key.
        scale: factor of the scores; None for ``features ** -0.5``.
        bias: ``[heads, queries, keys]``, added to the scores.
    """
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    scores = jnp.einsum("bkgqd,bksd->bkgqs", grouped, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.reshape(k.shape[1], -1, *bias.shape[1:])
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bkgqs,bksd->bkgqd", jax.nn.softmax(scores, -1), v).reshape(*q.shape[:-1], v.shape[-1])


def causal(length: int, window: int | None = None) -> jax.Array:
    """Which keys a query sees: its own and those before, `window` in all."""
    seen = jnp.tril(jnp.ones((length, length), bool))
    return seen if window is None else seen & ~jnp.tril(seen, -window)


def rotate(x: jax.Array, theta: float = 10_000.0) -> jax.Array:
    """Rotary embedding (https://arxiv.org/abs/2104.09864) of ``[batch, heads, length, features]``, halves paired."""
    features = x.shape[-1]
    angles = jnp.arange(x.shape[2])[:, None] * theta ** (-jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    cos, sin = (jnp.concatenate([f(angles)] * 2, -1) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-b, a], -1) * sin


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def conv(w: Weights, name: str, x: jax.Array, stride: int = 1, edge: int = 0, groups: int = 1) -> jax.Array:
    """A convolution over ``[batch, channels, ...]``, padded with `edge` zeros."""
    kernel = w[name + ".weight"]
    dimensions = kernel.ndim - 2
    names = ("NCH", "OIH", "NCH") if dimensions == 1 else ("NCHW", "OIHW", "NCHW")
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride,) * dimensions, ((edge, edge),) * dimensions, dimension_numbers=names,
        feature_group_count=groups,
    )  # fmt: skip
    return y + w[name + ".bias"][:, *[None] * dimensions] if name + ".bias" in w else y
