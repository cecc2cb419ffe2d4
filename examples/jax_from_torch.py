"""Call a JAX function from PyTorch: it gets jax.Arrays, and PyTorch's autograd goes through it.

python examples/jax_from_torch.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
import torch.nn as nn
import torchax  # noqa: F401  registers device jax
from torchax.interop import call_jax


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """A JAX function."""
    assert isinstance(x, jax.Array) and isinstance(scale, jax.Array)
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


class Block(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.linear = nn.Linear(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(call_jax(rms_norm, x, self.scale))


def main() -> None:
    torch.manual_seed(0)
    block = Block(8).to("jax")
    x = torch.randn(2, 8, device="jax")
    y = block(x)
    print(type(y), tuple(y.shape))

    y.square().sum().backward()
    print("gradient of the scale, through JAX:", block.scale.grad)

    reference = nn.functional.rms_norm(x, (8,), block.scale, eps=1e-6)
    torch.testing.assert_close(call_jax(rms_norm, x, block.scale), reference)
    print("the same as torch's rms_norm")


if __name__ == "__main__":
    main()
