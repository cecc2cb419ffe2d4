"""Encoders: torch's own, and BERT, ViT and CLIP of `transformers`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .parts import (
    Activation,
    Weights,
    attend,
    causal,
    conv,
    gelu,
    join_heads,
    layer_norm,
    linear,
    quick_gelu,
    split_heads,
)  # fmt: skip


def multihead(w: Weights, name: str, heads: int, x: jax.Array) -> jax.Array:
    """`nn.MultiheadAttention` of `x` with itself."""
    packed = x @ w[name + "in_proj_weight"].T + w[name + "in_proj_bias"]
    q, k, v = (split_heads(t, heads) for t in jnp.split(packed, 3, -1))
    return linear(w, name + "out_proj", join_heads(attend(q, k, v)))


def torch_encoder(layers: int, heads: int, w: Weights, x: jax.Array) -> jax.Array:
    """`nn.TransformerEncoder` of layers with the norm after, and GELU."""
    for i in range(layers):
        name = f"layers.{i}."
        x = layer_norm(w, name + "norm1", x + multihead(w, name + "self_attn.", heads, x))
        y = linear(w, name + "linear2", gelu(linear(w, name + "linear1", x)))
        x = layer_norm(w, name + "norm2", x + y)
    return x


def bert(layers: int, heads: int, w: Weights, tokens: jax.Array) -> jax.Array:
    """Logits of masked tokens."""
    parts = {key: w[f"bert.embeddings.{key}_embeddings.weight"] for key in ("word", "position", "token_type")}
    x = parts["word"][tokens] + parts["token_type"][0] + parts["position"][: tokens.shape[1]]
    x = layer_norm(w, "bert.embeddings.LayerNorm", x, 1e-12)
    for i in range(layers):
        name = f"bert.encoder.layer.{i}."
        q, k, v = (split_heads(linear(w, f"{name}attention.self.{t}", x), heads) for t in ("query", "key", "value"))
        y = linear(w, name + "attention.output.dense", join_heads(attend(q, k, v)))
        x = layer_norm(w, name + "attention.output.LayerNorm", x + y, 1e-12)
        y = linear(w, name + "output.dense", gelu(linear(w, name + "intermediate.dense", x)))
        x = layer_norm(w, name + "output.LayerNorm", x + y, 1e-12)
    x = gelu(linear(w, "cls.predictions.transform.dense", x))
    x = layer_norm(w, "cls.predictions.transform.LayerNorm", x, 1e-12)
    return x @ parts["word"].T + w["cls.predictions.bias"]


def _pre_norm_layer(
    w: Weights,
    x: jax.Array,
    names: tuple[str, str, str, str, str],
    heads: int,
    act: Activation,
    eps: float,
    seen: jax.Array | None = None,
) -> jax.Array:
    """A layer with the norms before; `names` of norm, attention, its output, norm, feed-forward part."""
    before, attention, out, after, feed_forward = names
    y = layer_norm(w, before, x, eps)
    q, k, v = (split_heads(linear(w, f"{attention}.{t}_proj", y), heads) for t in "qkv")
    x = x + linear(w, f"{attention}.{out}", join_heads(attend(q, k, v, seen)))
    return x + linear(w, feed_forward + ".fc2", act(linear(w, feed_forward + ".fc1", layer_norm(w, after, x, eps))))


def _patches(w: Weights, name: str, first: jax.Array, pixels: jax.Array) -> jax.Array:
    """A row for each patch of an image, `first` before them."""
    kernel = w[name + ".weight"]
    x = conv(w, name, pixels, kernel.shape[-1]).reshape(pixels.shape[0], kernel.shape[0], -1).swapaxes(1, 2)
    return jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2])), x], 1)


def vit(layers: int, heads: int, w: Weights, pixels: jax.Array) -> jax.Array:
    """Logits of classes."""
    x = _patches(w, "vit.embeddings.patch_embeddings.projection", w["vit.embeddings.cls_token"], pixels)
    x = x + w["vit.embeddings.position_embeddings"]
    for i in range(layers):
        n = f"vit.layers.{i}."
        names = (n + "layernorm_before", n + "attention", "o_proj", n + "layernorm_after", n + "mlp")
        x = _pre_norm_layer(w, x, names, heads, gelu, 1e-12)
    return linear(w, "classifier", layer_norm(w, "vit.layernorm", x, 1e-12)[:, 0])


def clip(layers: int, heads: int, end: int, w: Weights, tokens: jax.Array, pixels: jax.Array) -> jax.Array:
    """How well images fit texts, ``[images, texts]``; a text ends at its first token `end`."""

    def run(tower: str, x: jax.Array, seen: jax.Array | None = None) -> jax.Array:
        for i in range(layers):
            n = f"{tower}.encoder.layers.{i}."
            names = (n + "layer_norm1", n + "self_attn", "out_proj", n + "layer_norm2", n + "mlp")
            x = _pre_norm_layer(w, x, names, heads, quick_gelu, 1e-5, seen)
        return x

    def unit(x: jax.Array) -> jax.Array:
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    x = w["text_model.embeddings.token_embedding.weight"][tokens]
    x = x + w["text_model.embeddings.position_embedding.weight"][: tokens.shape[1]]
    x = layer_norm(w, "text_model.final_layer_norm", run("text_model", x, causal(tokens.shape[1])))
    texts = x[jnp.arange(x.shape[0]), jnp.argmax(tokens == end, -1)] @ w["text_projection.weight"].T
    name = "vision_model.embeddings."
    x = _patches(w, name + "patch_embedding", w[name + "class_embedding"], pixels)
    x = layer_norm(w, "vision_model.pre_layrnorm", x + w[name + "position_embedding.weight"])
    x = layer_norm(w, "vision_model.post_layernorm", run("vision_model", x)[:, 0])
    images = x @ w["visual_projection.weight"].T
    return unit(images) @ unit(texts).T * jnp.exp(w["logit_scale"])
