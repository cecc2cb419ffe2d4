"""A U-Net, and a classifier of tokens with a recurrent layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .parts import Weights, conv, linear


def unet(w: Weights, x: jax.Array) -> jax.Array:
    """`torchax_tools.bench.models.UNet` of images ``[batch, channels, height, width]``."""

    def norm(name: str, x: jax.Array) -> jax.Array:
        groups = x.reshape(x.shape[0], 8, -1)
        mean = groups.mean(-1, keepdims=True)
        variance = jnp.square(groups - mean).mean(-1, keepdims=True)
        y = ((groups - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
        return y * w[name + ".weight"][:, None, None] + w[name + ".bias"][:, None, None]

    def block(name: str, x: jax.Array) -> jax.Array:
        for i in (0, 3):
            x = jax.nn.silu(norm(f"{name}.{i + 1}", conv(w, f"{name}.{i}", x, 1, 1)))
        return x

    def half(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def double(name: str, x: jax.Array) -> jax.Array:
        kernel = w[name + ".weight"]  # [inputs, outputs, 2, 2], applied without overlap
        y = jnp.einsum("bihw,iopq->bohpwq", x, kernel)
        y = y.reshape(x.shape[0], kernel.shape[1], 2 * x.shape[2], 2 * x.shape[3])
        return y + w[name + ".bias"][:, None, None]

    one = block("down1", x)
    two = block("down2", half(one))
    y = block("join2", jnp.concatenate([two, double("up2", block("bottom", half(two)))], 1))
    y = block("join1", jnp.concatenate([one, double("up1", y)], 1))
    return conv(w, "head", y)


def reader(w: Weights, tokens: jax.Array) -> jax.Array:
    """`torchax_tools.bench.models.Reader`: the LSTM's last output through a linear layer."""
    x = w["embed.weight"][tokens]
    inputs = x @ w["rnn.weight_ih_l0"].T + w["rnn.bias_ih_l0"] + w["rnn.bias_hh_l0"]
    start = jnp.zeros((x.shape[0], w["rnn.weight_hh_l0"].shape[1]), x.dtype)

    def step(carry: tuple[jax.Array, jax.Array], given: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        h, c = carry
        i, f, g, o = jnp.split(given + h @ w["rnn.weight_hh_l0"].T, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    (h, _), _ = jax.lax.scan(step, (start, start), inputs.swapaxes(0, 1))
    return linear(w, "head", h)
