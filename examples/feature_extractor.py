"""A PyTorch model gives the features, a head written in JAX learns from them, with jax.grad and optax.

python examples/feature_extractor.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import torch
import torch.nn as nn
import torchax


def main() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    ).eval()  # evaluation mode: BatchNorm writes no statistics
    state, features = torchax.extract_jax(backbone)

    images = jax.random.normal(jax.random.key(0), (64, 1, 8, 8))
    labels = (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).astype(jnp.int32)

    head = {"w": jnp.zeros((128, 2)), "b": jnp.zeros(2)}
    tx = optax.adam(3e-2)
    opt_state = tx.init(head)

    def loss_fn(head: dict[str, jax.Array]) -> jax.Array:
        hidden = features(state, (images,))
        logits = hidden @ head["w"] + head["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(head: dict[str, jax.Array], opt_state: optax.OptState):
        loss, grads = jax.value_and_grad(loss_fn)(head)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(head, updates), opt_state, loss

    losses = []
    for i in range(60):
        head, opt_state, loss = step(head, opt_state)
        losses.append(float(loss))
        if i % 20 == 0 or i == 59:
            print(f"step {i:2}: loss {losses[-1]:.4f}")
    assert losses[-1] < 0.5 * losses[0]


if __name__ == "__main__":
    main()
