"""A PyTorch module with other weights, compiled: torch.func.functional_call under jax_jit.

python examples/functional_call.py
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torchax  # noqa: F401  registers device jax
from torchax.interop import jax_jit


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to("jax")
    x = torch.randn(8, 16, device="jax")

    @jax_jit
    def forward(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,))

    weights = {name: w.detach() for name, w in model.named_parameters()}
    y = forward(weights, x)
    print(type(y), tuple(y.shape))
    torch.testing.assert_close(y, model(x).detach())

    averaged = {name: w * 0.5 for name, w in weights.items()}
    print("other weights, the same program:", forward(averaged, x)[0])
    print(forward.cache_info())
    assert forward.cache_info().programs == 1


if __name__ == "__main__":
    main()
