"""Run a PyTorch model on device jax, one operator at a time, and look at the jax.Array behind a result.

python examples/eager_mode.py
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax


class MyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 28 * 28)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def main() -> None:
    torch.manual_seed(0)
    model = MyModel()
    images = torch.randn(4, 28 * 28)
    expected = model(images)  # on CPU

    model.to("jax")
    res = model(images.to("jax"))
    print(type(res))
    print(type(res.jax()), res.jax().shape, res.jax().dtype)
    assert type(res) is torchax.tensor.Tensor
    torch.testing.assert_close(res.cpu(), expected, rtol=1e-4, atol=1e-4)
    print("the same numbers as on CPU, within 1e-4")

    res.square().mean().backward()
    gradient = model.fc1.weight.grad
    assert gradient is not None
    print("gradient:", tuple(gradient.shape), "on", gradient.device)

    row = gradient[0]  # a view: it shares memory with the gradient
    row.zero_()
    assert gradient[0].abs().sum().item() == 0
    print(gradient[0, :3])


if __name__ == "__main__":
    main()
