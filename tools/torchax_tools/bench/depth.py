"""How long a training step takes to record and compile with `scan_layers`, for few layers and for many."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torchax
from torchax import interop

from .measure import Row
from .models import Block

FEW, MANY, WIDTH = 4, 48, 256


def _seconds(layers: int, scanned: bool = True) -> float:
    """From the first call of a step to its end, less a later call."""
    torch.manual_seed(0)
    stack = torch.nn.ModuleList(Block(WIDTH) for _ in range(layers)).to("jax")
    model = interop.scan_layers(stack) if scanned else stack
    optimizer = torch.optim.AdamW(model.parameters())

    @torchax.compile
    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        for layer in model:
            x = layer(x)
        loss = x.square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    x, seconds = torch.randn(2, 64, WIDTH, device="jax"), []
    for _ in range(3):  # the optimizer makes its state in the first; the second is recorded with it
        start = time.perf_counter()
        step(x).item()
        seconds.append(time.perf_counter() - start)
    return seconds[1] - seconds[2]


def depth() -> Iterator[Row]:
    """Rows of the group `depth`."""
    _seconds(2)
    rounds = [(_seconds(FEW), _seconds(MANY)) for _ in range(3)]
    few, many = (min(side) for side in zip(*rounds, strict=True))
    yield Row("depth", f"scan_layers, {MANY} layers: compile", many / few, "x", f"{FEW} layers", 1.3, many, few)
    unrolled = _seconds(FEW, scanned=False)
    yield Row("depth", f"{FEW} layers: compile", few / unrolled, "x", "without scan_layers", None, few, unrolled)
