"""Training the three-layer model: loss and gradients against JAX without `jit`, steps against torch on CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax

from .measure import Row, ratio
from .models import ThreeLayers


def make_step(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A step of SGD with momentum, as PyTorch users write it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def train() -> Iterator[Row]:
    """Loss and gradients; a step with momentum, eagerly and compiled."""
    # the fastest for torch at this size; and its threads would go on spinning for a while, on cores that XLA needs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ThreeLayers()
    x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))
    jmodel, jx, jy = copy.deepcopy(model).to("jax"), x.to("jax"), y.to("jax")
    weights = {k: jnp.asarray(v.detach().numpy()) for k, v in model.named_parameters()}
    ax, ay = jnp.asarray(x.numpy()), jnp.asarray(y.numpy(), jnp.int32)

    def jax_loss(w: dict[str, jax.Array]) -> jax.Array:
        h = jax.nn.relu(ax @ w["fc1.weight"].T + w["fc1.bias"])
        h = jax.nn.relu(h @ w["fc2.weight"].T + w["fc2.bias"])
        logp = jax.nn.log_softmax(h @ w["fc3.weight"].T + w["fc3.bias"])
        return -jnp.take_along_axis(logp, ay[:, None], 1).mean()

    def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> object:
        loss = F.cross_entropy(model(x), y)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    both = jax.value_and_grad(jax_loss)
    yield ratio(
        "train",
        "loss and gradients, eager",
        lambda: gradients(jmodel, jx, jy),
        lambda: both(weights),
        "jax.value_and_grad, no jit",
        0.18,
        lambda: gradients(model, x, y),
        rounds=9,
    )
    on_cpu = make_step(copy.deepcopy(model), x, y)
    eager = make_step(copy.deepcopy(model).to("jax"), jx, jy)
    yield ratio("train", "SGD step, eager", lambda: eager(jx, jy), lambda: on_cpu(x, y), "torch CPU", 5.0)
    compiled = torchax.compile(make_step(copy.deepcopy(model).to("jax"), jx, jy))
    yield ratio("train", "SGD step, compiled", lambda: compiled(jx, jy), lambda: on_cpu(x, y), "torch CPU", 0.5)
