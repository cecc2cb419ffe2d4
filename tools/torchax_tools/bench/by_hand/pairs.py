"""Encoders with decoders of `transformers`: T5 and Whisper."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from .parts import Weights, attend, causal, conv, gelu, join_heads, layer_norm, linear, rms_norm, split_heads


def _buckets(length: int, both: bool, buckets: int, furthest: int = 128) -> jax.Array:
    """T5's bucket of the distance of each key from each query: exact for near ones, logarithmic beyond."""
    distance = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
    first = jnp.zeros_like(distance)
    if both:
        buckets //= 2
        first, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    else:
        distance = -jnp.minimum(distance, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(furthest / exact) * (buckets - exact)
    far = jnp.minimum(exact + far.astype(jnp.int32), buckets - 1)
    return first + jnp.where(distance < exact, distance, far)


def t5(layers: int, heads: int, buckets: int, w: Weights, tokens: jax.Array, answer: jax.Array) -> jax.Array:
    """Logits of the answer's tokens; a T5 of version 1.1 with tied embeddings."""

    def attention(name: str, x: jax.Array, other: jax.Array, **how: jax.Array) -> jax.Array:
        q, k, v = (split_heads(linear(w, name + t, y), heads) for t, y in (("q", x), ("k", other), ("v", other)))
        return linear(w, name + "o", join_heads(attend(q, k, v, scale=1.0, **how)))

    def stack(part: str, x: jax.Array, memory: jax.Array | None) -> jax.Array:
        table = w[f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        how = {"bias": table[_buckets(x.shape[1], memory is None, buckets)].transpose(2, 0, 1)}
        if memory is not None:
            how["seen"] = causal(x.shape[1])
        for i in range(layers):
            name = f"{part}.block.{i}.layer."
            y = rms_norm(w, name + "0.layer_norm", x)
            x = x + attention(name + "0.SelfAttention.", y, y, **how)
            if memory is not None:
                x = x + attention(name + "1.EncDecAttention.", rms_norm(w, name + "1.layer_norm", x), memory)
            last = name + ("1." if memory is None else "2.")
            y, dense = rms_norm(w, last + "layer_norm", x), last + "DenseReluDense."
            y = jax.nn.gelu(linear(w, dense + "wi_0", y)) * linear(w, dense + "wi_1", y)
            x = x + linear(w, dense + "wo", y)
        return rms_norm(w, part + ".final_layer_norm", x)

    embedding = w["shared.weight"]
    x = stack("decoder", embedding[answer], stack("encoder", embedding[tokens], None))
    return (x * embedding.shape[1] ** -0.5) @ embedding.T


def whisper(layers: int, heads: int, w: Weights, sound: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits of the next tokens, for sound ``[batch, bins, frames]``."""

    def attention(name: str, x: jax.Array, other: jax.Array, seen: jax.Array | None = None) -> jax.Array:
        q, k, v = (
            split_heads(linear(w, f"{name}.{t}_proj", y), heads) for t, y in (("q", x), ("k", other), ("v", other))
        )
        return linear(w, name + ".out_proj", join_heads(attend(q, k, v, seen)))

    def layer(name: str, x: jax.Array, memory: jax.Array | None, seen: jax.Array | None) -> jax.Array:
        norm = functools.partial(layer_norm, w)
        y = norm(name + "self_attn_layer_norm", x)
        x = x + attention(name + "self_attn", y, y, seen)
        if memory is not None:
            x = x + attention(name + "encoder_attn", norm(name + "encoder_attn_layer_norm", x), memory)
        return x + linear(w, name + "fc2", gelu(linear(w, name + "fc1", norm(name + "final_layer_norm", x))))

    x = gelu(conv(w, "model.encoder.conv1", sound, 1, 1))
    x = gelu(conv(w, "model.encoder.conv2", x, 2, 1)).swapaxes(1, 2) + w["model.encoder.embed_positions.weight"]
    for i in range(layers):
        x = layer(f"model.encoder.layers.{i}.", x, None, None)
    memory = layer_norm(w, "model.encoder.layer_norm", x)
    embedding = w["model.decoder.embed_tokens.weight"]
    x = embedding[tokens] + w["model.decoder.embed_positions.weight"][: tokens.shape[1]]
    for i in range(layers):
        x = layer(f"model.decoder.layers.{i}.", x, memory, causal(tokens.shape[1]))
    return layer_norm(w, "model.decoder.layer_norm", x) @ embedding.T
