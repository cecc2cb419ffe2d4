"""Whole training steps: ten compiled ones equal ten eager ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "SGD nesterov, decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "SGD one by one": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.1, foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2),
    "AdamW one by one, amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True, foreach=False),
    "AdamW capturable": lambda p: torch.optim.AdamW(p, 1e-2, capturable=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5),
}


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: bool = True) -> Callable[..., torch.Tensor]:
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def assert_equal_state(a: Any, b: Any, rtol: float = 1e-4, atol: float = 2e-6) -> None:
    """The same nest of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=rtol, atol=atol)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_equal_state(a[k], b[k], rtol, atol)
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal_state(x, y, rtol, atol)
    else:
        assert a == b


def train(
    model: nn.Module, make: Any, compiled: bool, x: Any, y: Any, scheduled: bool = True, steps: int = 10
) -> tuple[list[float], Any, Any]:
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) if scheduled else None
    step = make_step(model, optimizer)
    if compiled:
        step = torchax.compile(step)
    torch.manual_seed(5)
    losses = []
    for _ in range(steps):
        losses.append(step(x, y).item())
        if scheduler is not None:
            scheduler.step()
    return losses, optimizer, step


@pytest.mark.parametrize("net", [plain, noisy], ids=["plain", "BatchNorm and dropout"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps(name: str, net: Any) -> None:
    torch.manual_seed(0)
    model = net()
    if net is noisy:
        model[0].bias.requires_grad_(False)  # its gradient is noise around zero, which Adam would blow up
    x, y = torch.randn(16, 8, device="jax"), torch.randint(0, 4, (16,), device="jax")
    eager, compiled = copy.deepcopy(model).to("jax"), copy.deepcopy(model).to("jax")
    want, eager_optimizer, _ = train(eager, OPTIMIZERS[name], False, x, y)
    got, optimizer, step = train(compiled, OPTIMIZERS[name], True, x, y)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-5)
    assert_equal_state(compiled.state_dict(), eager.state_dict())
    assert_equal_state(
        {n: p.grad for n, p in compiled.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in eager.named_parameters() if p.grad is not None},
        atol=1e-5,
    )
    assert_equal_state(optimizer.state_dict()["state"], eager_optimizer.state_dict()["state"], atol=1e-5)
    group, eager_group = optimizer.param_groups[0], eager_optimizer.param_groups[0]
    assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in eager_group.items() if k != "params"}
    assert type(group["lr"]) is float
    info = step.cache_info()
    assert info.misses <= 2 and info.hits >= 8, "the learning rate changed at every step, without a new recording"


def test_eager_and_compiled_steps_can_alternate() -> None:
    torch.manual_seed(0)
    model = plain().to("jax")
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 8, device="jax"), torch.randint(0, 4, (16,), device="jax")
    steps = []
    for m in (model, twin):
        optimizer = torch.optim.AdamW(m.parameters(), 1e-2)
        steps.append(make_step(m, optimizer))
    compiled = torchax.compile(steps[0])
    for i in range(6):
        a = (compiled if i % 2 else steps[0])(x, y)
        b = steps[1](x, y)
        torch.testing.assert_close(a.detach(), b.detach())
    assert_equal_state(model.state_dict(), twin.state_dict())


def test_gradients_accumulate() -> None:
    torch.manual_seed(0)
    model, twin = plain().to("jax"), plain().to("jax")
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(16, 8, device="jax"), torch.randint(0, 4, (16,), device="jax")

    def add_gradients(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(m(x), y)
        loss.backward()
        return loss

    compiled = torchax.compile(lambda x, y: add_gradients(model, x, y))
    for i in range(6):
        compiled(x, y)
        add_gradients(twin, x, y)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        if i % 3 == 2:
            model.zero_grad()
            twin.zero_grad()


def test_zero_grad_without_none() -> None:
    torch.manual_seed(0)
    model = plain().to("jax")
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 8, device="jax"), torch.randint(0, 4, (16,), device="jax")

    def make(m: nn.Module) -> Any:
        optimizer = torch.optim.SGD(m.parameters(), 0.1)

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(m(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    compiled, eager = torchax.compile(make(model)), make(twin)
    for _ in range(5):
        torch.testing.assert_close(compiled(), eager())


def test_settings_of_the_optimizer_retrace() -> None:
    torch.manual_seed(0)
    model = plain().to("jax")
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 8, device="jax"), torch.randint(0, 4, (16,), device="jax")
    pairs = [(m, torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)) for m in (model, twin)]
    eager = make_step(*pairs[1])
    compiled = torchax.compile(make_step(*pairs[0]))
    for i in range(6):
        if i == 3:
            for _, optimizer in pairs:
                optimizer.param_groups[0]["momentum"] = 0.5
        torch.testing.assert_close(compiled(x, y).detach(), eager(x, y).detach())
    state = pairs[0][1].state_dict()
    for _, optimizer in pairs:
        optimizer.load_state_dict(copy.deepcopy(state))  # new state tensors
    for _ in range(3):
        torch.testing.assert_close(compiled(x, y).detach(), eager(x, y).detach())


def test_ragged_last_batch_and_evaluation_in_between() -> None:
    torch.manual_seed(0)
    model = noisy().to("jax")
    model[0].bias.requires_grad_(False)
    twin = copy.deepcopy(model)
    steps = [make_step(m, torch.optim.Adam(m.parameters(), 1e-3)) for m in (model, twin)]
    compiled = torchax.compile(steps[0])
    evaluate = torchax.compile(model)
    for epoch in range(3):
        for n in (8, 8, 5):
            x, y = torch.randn(n, 8, device="jax"), torch.randint(0, 4, (n,), device="jax")
            torch.manual_seed(epoch * 100 + n)
            a = compiled(x, y)
            torch.manual_seed(epoch * 100 + n)
            b = steps[1](x, y)
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-5)
        model.eval()
        twin.eval()
        with torch.no_grad():
            torch.testing.assert_close(evaluate(x), twin(x), rtol=1e-3, atol=1e-4)
        model.train()
        twin.train()


def test_frozen_and_thawed_parameters() -> None:
    torch.manual_seed(0)
    model = plain().to("jax")
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 8, device="jax"), torch.randint(0, 4, (16,), device="jax")
    steps = [make_step(m, torch.optim.SGD(m.parameters(), 0.1)) for m in (model, twin)]
    compiled = torchax.compile(steps[0])
    for i in range(6):
        for m in (model, twin):
            m[0].requires_grad_(i < 2 or i > 3)
        torch.testing.assert_close(compiled(x, y).detach(), steps[1](x, y).detach())
    assert_equal_state(model.state_dict(), twin.state_dict())


def test_gradient_penalty_with_an_optimizer() -> None:
    """The second derivative reads views of parameters, which the optimizer overwrites in the same step."""

    def run(device: str, wrap: Any) -> tuple[float, dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x, y = torch.linspace(-1, 1, 40).view(5, 8).to(device), torch.tensor([0, 1, 2, 3, 0]).to(device)

        def step(x: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            x = x.detach().requires_grad_()
            loss = F.cross_entropy(model(x), y)
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + grad.norm()).backward()
            optimizer.step()
            return loss.detach()

        step = wrap(step)
        return [step(x).item() for _ in range(3)][-1], model.state_dict()

    loss, state = run("jax", torchax.compile)
    want, want_state = run("cpu", lambda f: f)
    assert loss == pytest.approx(want, rel=1e-4)
    assert_equal_state(state, want_state)


def test_an_optimizer_that_counts_with_python_numbers() -> None:
    class Corrected(torch.optim.Optimizer):
        def __init__(self, params: Any):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["step"], state["mean"] = 0, torch.zeros_like(p)
                    state["step"] += 1
                    state["mean"].mul_(0.9).add_(p.grad, alpha=0.1)
                    p.sub_(group["lr"] * state["mean"] / (1 - 0.9 ** state["step"]))

    def run(device: str, wrap: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(2, device=device))
        optimizer = Corrected([weight])

        def step() -> None:
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()

        step = wrap(step)
        for _ in range(10):
            step()
        return weight.detach().cpu()

    with pytest.warns(UserWarning, match="'step' of an optimizer went from 8 to 9, for the 8th time"):
        found = run("jax", torchax.compile)
    torch.testing.assert_close(found, run("cpu", lambda f: f))
