"""Call PyTorch from JAX: jax.jit, jax.grad and jax.vmap of a PyTorch function, and of a module.

python examples/torch_from_jax.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax.interop import jax_view


def torch_loss(x: torch.Tensor) -> torch.Tensor:
    """A PyTorch function."""
    assert isinstance(x, torch.Tensor)
    return F.softplus(x).square().mean()


def main() -> None:
    loss = jax_view(torch_loss)
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    value, gradient = jax.jit(jax.value_and_grad(loss))(x)
    print("value:", value, " gradient:", gradient[0])
    assert isinstance(gradient, jax.Array)
    print("one value for each row, by jax.vmap:", jax.vmap(loss)(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))
    weights, apply = torchax.extract_jax(model)  # a dict of jax.Arrays, and a pure function of it
    print("weights:", {name: w.shape for name, w in weights.items()})
    y = jax.jit(apply)(weights, (x,))
    gradients = jax.grad(lambda w: apply(w, (x,)).sum())(weights)
    print("result:", y[:, 0], " gradient of the last bias:", gradients["2.bias"])
    torch.testing.assert_close(torchax.tensor.Tensor(y).cpu(), model(torch.tensor(x.tolist())).detach())


if __name__ == "__main__":
    main()
