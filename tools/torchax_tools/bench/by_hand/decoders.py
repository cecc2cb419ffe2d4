"""Causal language models of `transformers`: logits ``[batch, length, vocabulary]`` of tokens ``[batch, length]``."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from .parts import (
    Activation,
    Weights,
    attend,
    causal,
    conv,
    join_heads,
    layer_norm,
    linear,
    rms_norm,
    rotate,
    split_heads,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Llama:
    """Llama and those that are made like it.

    Attributes:
        layers: how many.
        heads: of queries.
        key_heads: of keys and values.
        window: keys that a query sees; None for all before it (Mistral).
        act: of the feed-forward part.
        embedding_scale: factor of the embedding (Gemma).
        norm_offset: see `rms_norm` (Gemma).
        chosen: experts for each token; 0 for a plain feed-forward part (Mixtral).
    """

    layers: int
    heads: int
    key_heads: int
    window: int | None = None
    act: Activation = jax.nn.silu
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    chosen: int = 0

    def norm(self, w: Weights, name: str, x: jax.Array) -> jax.Array:
        return rms_norm(w, name, x, offset=self.norm_offset)

    def __call__(self, w: Weights, tokens: jax.Array) -> jax.Array:
        x = w["model.embed_tokens.weight"][tokens]
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        seen = causal(tokens.shape[1], self.window)
        for i in range(self.layers):
            name = f"model.layers.{i}."
            y = self.norm(w, name + "input_layernorm", x)
            q, k, v = (
                split_heads(linear(w, f"{name}self_attn.{part}_proj", y), n)
                for part, n in (("q", self.heads), ("k", self.key_heads), ("v", self.key_heads))
            )
            x = x + linear(w, name + "self_attn.o_proj", join_heads(attend(rotate(q), rotate(k), v, seen)))
            y = self.norm(w, name + "post_attention_layernorm", x)
            x = x + (self.experts(w, name + "mlp.", y) if self.chosen else self.feed_forward(w, name + "mlp.", y))
        head = w["lm_head.weight"] if "lm_head.weight" in w else w["model.embed_tokens.weight"]
        return self.norm(w, "model.norm", x) @ head.T

    def feed_forward(self, w: Weights, name: str, x: jax.Array) -> jax.Array:
        gated = self.act(linear(w, name + "gate_proj", x)) * linear(w, name + "up_proj", x)
        return linear(w, name + "down_proj", gated)

    def experts(self, w: Weights, name: str, x: jax.Array) -> jax.Array:
        """Each token through its `chosen` experts: rows sorted by expert, a product for each group of rows."""
        rows = x.reshape(-1, x.shape[-1])
        chances, which = jax.lax.top_k(jax.nn.softmax(linear(w, name + "gate", rows), -1), self.chosen)
        chances = chances / chances.sum(-1, keepdims=True)
        up, down = w[name + "experts.gate_up_proj"], w[name + "experts.down_proj"]
        order = jnp.argsort(which.ravel())
        sizes = jnp.bincount(which.ravel(), length=up.shape[0])
        gate, y = jnp.split(jax.lax.ragged_dot(rows[order // self.chosen], up.swapaxes(1, 2), sizes), 2, -1)
        y = jax.lax.ragged_dot(self.act(gate) * y, down.swapaxes(1, 2), sizes)
        y = y[jnp.argsort(order)].reshape(*which.shape, -1)
        return (y * chances[..., None]).sum(1).reshape(x.shape)


def gpt2(layers: int, heads: int, w: Weights, tokens: jax.Array) -> jax.Array:
    """GPT-2, whose linear layers keep their weights as ``[inputs, outputs]``."""

    def layer(name: str, x: jax.Array) -> jax.Array:
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][: tokens.shape[1]]
    seen = causal(tokens.shape[1])
    for i in range(layers):
        name = f"transformer.h.{i}."
        qkv = layer(name + "attn.c_attn", layer_norm(w, name + "ln_1", x))
        q, k, v = (split_heads(t, heads) for t in jnp.split(qkv, 3, -1))
        x = x + layer(name + "attn.c_proj", join_heads(attend(q, k, v, seen)))
        y = jax.nn.gelu(layer(name + "mlp.c_fc", layer_norm(w, name + "ln_2", x)))
        x = x + layer(name + "mlp.c_proj", y)
    return layer_norm(w, "transformer.ln_f", x) @ w["transformer.wte.weight"].T


def mamba(layers: int, w: Weights, tokens: jax.Array) -> jax.Array:
    """Mamba (https://arxiv.org/abs/2312.00752)."""
    x = w["backbone.embeddings.weight"][tokens]
    for i in range(layers):
        name = f"backbone.layers.{i}."
        x = x + _selective_scan(w, name + "mixer.", rms_norm(w, name + "norm", x, 1e-5))
    return rms_norm(w, "backbone.norm_f", x, 1e-5) @ w["backbone.embeddings.weight"].T


def _selective_scan(w: Weights, name: str, x: jax.Array) -> jax.Array:
    h, gate = jnp.split(linear(w, name + "in_proj", x), 2, -1)
    (width, states), length = w[name + "A_log"].shape, x.shape[1]
    reach = w[name + "conv1d.weight"].shape[2] - 1
    h = conv(w, name + "conv1d", h.swapaxes(1, 2), 1, reach, groups=width)[..., :length].swapaxes(1, 2)
    h = jax.nn.silu(h)
    rank = w[name + "dt_proj.weight"].shape[1]
    pace, into, out_of = jnp.split(linear(w, name + "x_proj", h), [rank, rank + states], -1)
    pace = jax.nn.softplus(linear(w, name + "dt_proj", pace))
    kept = jnp.exp(-jnp.exp(w[name + "A_log"]) * pace[..., None])  # [batch, length, width, states]
    new = pace[..., None] * into[:, :, None] * h[..., None]

    def step(state: jax.Array, given: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        kept, new, out_of = given
        state = kept * state + new
        return state, jnp.einsum("bds,bs->bd", state, out_of)

    over_time = tuple(a.swapaxes(0, 1) for a in (kept, new, out_of))
    # one operation after the other, as the loop of `transformers` is written out when it is traced
    _, y = jax.lax.scan(step, jnp.zeros_like(new[:, 0]), over_time, unroll=length)
    y = (y.swapaxes(0, 1) + h * w[name + "D"]) * jax.nn.silu(gate)
    return linear(w, name + "out_proj", y)
