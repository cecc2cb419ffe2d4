"""JittableModule: a module whose calls run as one XLA program, with its parameters and buffers at hand.

python examples/jittable_module.py
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torchax  # noqa: F401  registers device jax
from torchax.interop import JittableModule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(x))


def main() -> None:
    torch.manual_seed(0)
    net = Net().to("jax")
    jittable = JittableModule(net)
    x = torch.randn(8, 16, device="jax") + 3

    print("parameters:", {name: tuple(p.shape) for name, p in jittable.params.items()})
    jittable(x)  # in training mode BatchNorm keeps statistics: buffers are kept up to date
    print("running mean:", jittable.buffers["norm.running_mean"][:4])
    assert net.norm.running_mean is not None and net.norm.running_mean.mean().item() > 0.2

    jittable.eval()
    torch.testing.assert_close(jittable(x), net(x))
    print("the module's own call gives the same")

    print("another method, compiled:", tuple(jittable.jittable_call("embed", x).shape))
    zeros = {name: torch.zeros_like(p) for name, p in jittable.params.items()}
    print("with other weights:", jittable.functional_call("forward", zeros, jittable.buffers, x)[0])


if __name__ == "__main__":
    main()
