"""What the plugin with kernels costs where it has nothing to do: the same on CPU with it and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax import plugins

from .measure import Row, failed, times
from .steps import torch_step


def _cases() -> dict[str, Callable[[], torch.Tensor]]:
    """Operators for which the plugin has a kernel, others, and a compiled step."""
    torch.manual_seed(0)
    a, b, x, bias = (torch.randn(s, device="jax") for s in ((16, 16), (16, 16), (64, 256), (256,)))
    weight = torch.randn(256, 256, device="jax")
    q, k, v = (torch.randn(2, 4, 128, 64, device="jax") for _ in range(3))
    matrices, ends = (
        torch.randn(4, 256, 128, device="jax"),
        torch.tensor([16, 32, 48, 64], dtype=torch.int32, device="jax"),
    )
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True).to("jax")
    tokens = torch.randn(2, 64, 64, device="jax")
    labels = torch.randint(0, 64, (2, 64), device="jax")
    step = torchax.compile(torch_step(layer, torch.optim.SGD(layer.parameters(), 1e-3)))

    return {
        "a + b": lambda: a + b,
        "F.linear": lambda: F.linear(x, weight, bias),
        "attention": lambda: F.scaled_dot_product_attention(q, k, v),
        "causal attention with a gradient": lambda: _pulled(q, k, v),
        "grouped_mm": lambda: F.grouped_mm(x, matrices, offs=ends),
        "a compiled step of an encoder layer": lambda: step(tokens, labels),
    }


def _pulled(*qkv: torch.Tensor) -> torch.Tensor:
    query, key, value = (t.detach().requires_grad_() for t in qkv)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return torch.autograd.grad(out.sum(), query)[0]


def presence(rounds: int = 15) -> Iterator[Row]:
    """Ratios of the lower quartiles of `rounds`, the plugin switched on and off in turns."""
    try:
        for name, case in _cases().items():
            seen: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(rounds):
                for there, seconds in seen.items():
                    (plugins.enable if there else plugins.disable)("pallas")
                    seconds += times(case, rounds=1)
            mine, other = (sorted(seconds)[rounds // 4] for seconds in seen.values())
            yield Row("presence", name, mine / other, "x", "without torchax-ops-pallas", 1.05, mine, other)
    except Exception as error:
        yield failed("presence", "torchax-ops-pallas", error)
    finally:
        plugins.enable("pallas")
