"""A whole training step (forward, backward, optimizer) as one XLA program.

python examples/compile_train_step.py
"""

from __future__ import annotations

import copy
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer):
    def train_step(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train_step


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)).to("jax")
    twin = copy.deepcopy(model)
    x, labels = torch.randn(32, 64, device="jax"), torch.randint(0, 10, (32,), device="jax")

    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3) for m in (twin, model)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]
    eager = make_step(twin, optimizers[0])
    compiled = torchax.compile(make_step(model, optimizers[1]))

    for i in range(10):
        a, b = eager(x, labels), compiled(x, labels)
        for schedule in schedules:
            schedule.step()  # outside: Python code in a compiled function runs while recording only
        if i % 3 == 0:
            print(f"step {i}: loss {a.item():.5f} eager, {b.item():.5f} compiled")
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    print("the same weights after ten steps;", compiled.cache_info())
    assert compiled.cache_info().misses == 2  # the first call makes the optimizer's state; other rates compile nothing

    for name, step in (("eager", eager), ("compiled", compiled)):
        begin = time.perf_counter()
        for _ in range(20):
            loss = step(x, labels)
        loss.item()  # waits for the device
        print(f"{name}: {(time.perf_counter() - begin) / 20 * 1e3:.2f} ms per step")


if __name__ == "__main__":
    main()
