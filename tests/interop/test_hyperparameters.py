"""Hyperparameters of `torch.optim` that change between calls of a compiled step: inputs, not another program."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torchax
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torchax.errors import Retraced
from torchax_interop._symbolic import setting_of, symbolic

optim = torch.optim
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, 0.1, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "SGD nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=False),
    "Adam amsgrad": lambda p: optim.Adam(p, 1e-2, weight_decay=1e-2, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, 1e-2),
    "RMSprop": lambda p: optim.RMSprop(p, 1e-2, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, 1e-2, lr_decay=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0, weight_decay=1e-2),
    "Adamax": lambda p: optim.Adamax(p, 1e-2),
    "NAdam": lambda p: optim.NAdam(p, 1e-2, weight_decay=1e-2, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, 1e-2),
    "ASGD": lambda p: optim.ASGD(p, 1e-2, t0=3.0),
    "Rprop": lambda p: optim.Rprop(p, 1e-2),
    "Muon": lambda p: optim.Muon([q for q in p if q.dim() == 2], 1e-2),
}


def shrink(optimizer: torch.optim.Optimizer) -> None:
    """Change every float among the hyperparameters that may be any number, as schedulers do."""
    for group in optimizer.param_groups:
        for name, value in group.items():
            if isinstance(value, float):
                group[name] = value * 0.97
            elif isinstance(value, tuple) and name != "ns_coefficients":
                group[name] = tuple([v * 0.97 if v < 1 else v * 0.999 for v in value])


class Run:
    """A small model that is trained on a device, compiled or not."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], device: str, **options: Any):
        generator = torch.Generator().manual_seed(0)
        self.w = [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in ((3, 2), (2,))]
        self.optimizer = make(self.w)
        self.step: Any = self._step if device == "cpu" else torchax.compile(self._step, **options)
        self.device = device

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = (torch.tanh(x @ self.w[0]) + self.w[1]).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def steps(self, n: int, outside: Callable[[], None]) -> list[torch.Tensor]:
        for i in range(n):
            self.step(torch.tensor([[1.0, -0.5, 0.25], [0.5, (-1.0) ** i, -1.0]]).to(self.device))
            outside()
        return [w.detach().cpu() for w in self.w]

    def plain(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]


def assert_same(found: Run, want: Run, a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert found.plain() == want.plain()
    assert "SymFloat" not in repr([type(x) for g in found.plain() for x in g.values()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_float_changes_at_every_step(name: str) -> None:
    want, found = Run(OPTIMIZERS[name], "cpu"), Run(OPTIMIZERS[name], "jax")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = (run.steps(10, lambda run=run: shrink(run.optimizer)) for run in (found, want))
    assert_same(found, want, a, b)
    assert found.step.cache_info()[:2] == (8, 2), found.step.cache_info().reasons


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, total_steps=12),
    "CyclicLR": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=3),
}


@pytest.mark.parametrize("make", [OPTIMIZERS["SGD nesterov"], OPTIMIZERS["AdamW"]], ids=["momentum", "betas"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_cycles_momentum(name: str, make: Any) -> None:
    runs = [Run(make, "jax", on_retrace="error"), Run(make, "cpu")]
    weights = []
    for run in runs:
        scheduler = SCHEDULERS[name](run.optimizer)
        weights.append(run.steps(10, scheduler.step))
    assert_same(runs[0], runs[1], weights[0], weights[1])
    assert runs[0].step.cache_info()[:2] == (8, 2)


def test_groups_have_their_own() -> None:
    def make(w: Any) -> torch.optim.Optimizer:
        return optim.SGD(
            [{"params": w[:1], "momentum": 0.5}, {"params": w[1:], "weight_decay": 0.1}], 0.1, momentum=0.9
        )

    def outside(run: Run) -> None:
        run.optimizer.param_groups[1]["momentum"] *= 0.9
        run.optimizer.param_groups[1]["weight_decay"] *= 2

    want, found = Run(make, "cpu"), Run(make, "jax")
    a, b = (run.steps(6, lambda run=run: outside(run)) for run in (found, want))
    assert_same(found, want, a, b)
    assert found.step.cache_info().misses == 2


# ---------------------------------------------------------------------- what is another program
def test_an_answer_that_changes() -> None:
    runs = [Run(OPTIMIZERS["SGD"], "jax"), Run(OPTIMIZERS["SGD"], "cpu")]
    weights = []
    for run in runs:
        for momentum in (0.9, 0.8, 0.0, 0.0, 0.7):
            run.optimizer.param_groups[0]["momentum"] = momentum
            weights.append(run.steps(1, lambda: None))
    assert_same(runs[0], runs[1], weights[4], weights[9])
    info = runs[0].step.cache_info()
    assert info.reasons[1:] == ("'momentum' of an optimizer went from 0.8 to 0.0",)  # and the first program served 0.7
    runs[0].step.on_retrace = "error"
    runs[0].optimizer.param_groups[0].update(momentum=0.0, weight_decay=0)
    with pytest.raises(Retraced, match="'weight_decay' of an optimizer went from 0.01 to 0"):
        runs[0].steps(1, lambda: None)
    for strange in (None, True, "much"):
        runs[0].optimizer.param_groups[0]["weight_decay"] = strange
        with pytest.raises(Retraced, match=f"'weight_decay' of an optimizer went from 0.01 to {strange!r}"):
            runs[0].steps(1, lambda: None)


@pytest.mark.filterwarnings("ignore:.*a Python number or a buffer on CPU")
@pytest.mark.parametrize("name", ["lr", "momentum"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_function_that_sets_them_itself(when: str, name: str) -> None:
    def train(device: str) -> tuple[Run, list[torch.Tensor]]:
        run = Run(OPTIMIZERS["SGD"], device)
        group = run.optimizer.param_groups[0]

        def step(x: torch.Tensor, value: float) -> None:
            if when == "before":
                group[name] = value
            run._step(x)
            if when == "after":
                group[name] = value

        fn = step if device == "cpu" else torchax.compile(step)
        x = torch.tensor([[1.0, -0.5, 0.25]]).to(device)
        for value in (0.9, 0.9, 0.5, 0.9, 0.5, 0.5):
            fn(x, value)
            group[name] = 0.3 if when == "after" else value
        return run, [w.detach().cpu() for w in run.w]

    (found, a), (want, b) = train("jax"), train("cpu")
    assert_same(found, want, a, b)


def test_an_optimizer_that_is_not_torchs_gets_numbers() -> None:
    class Heavy(torch.optim.Optimizer):
        def __init__(self, params: Any):
            super().__init__(params, {"lr": 0.1, "momentum": 0.9})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                assert type(group["momentum"]) is float
                for p in group["params"]:
                    self.state[p].setdefault("v", torch.zeros_like(p)).mul_(math.sqrt(group["momentum"])).add_(p.grad)
                    p.sub_(group["lr"] * self.state[p]["v"])

    want, found = Run(Heavy, "cpu"), Run(Heavy, "jax")
    a, b = (run.steps(4, lambda run=run: shrink(run.optimizer)) for run in (found, want))
    assert_same(found, want, a, b)
    assert "'momentum' of an optimizer went from" in found.step.cache_info().reasons[-1]


# ---------------------------------------------------------------------- what the user sees
def test_what_is_seen_after_a_step_that_raises() -> None:
    run = Run(OPTIMIZERS["AdamW"], "jax")
    before = run.plain()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = run.optimizer.register_step_post_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run.steps(1, lambda: None)
    assert run.plain() == before and type(run.plain()[0]["betas"][0]) is float
    handle.remove()
    run.steps(2, lambda: None)
    assert run.plain() == before and type(run.plain()[0]["betas"][0]) is float


def test_a_tensor_as_learning_rate() -> None:
    number = lambda x: torch.tensor(x, device="jax")
    tensors = lambda p: optim.AdamW(p, number(1e-2), (0.9, 0.99), eps=1e-6, capturable=True)
    runs = [Run(tensors, "jax"), Run(lambda p: optim.AdamW(p, 1e-2, (0.9, 0.99), eps=1e-6), "cpu")]

    def outside(group: dict[str, Any]) -> None:
        group["eps"] *= 2

    a, b = (run.steps(4, lambda run=run: outside(run.optimizer.param_groups[0])) for run in runs)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert runs[0].step.cache_info().misses == 2


def test_arithmetic_and_questions_of_a_symbol() -> None:
    group: dict[str, Any] = {"m": 0.75, "n": (0.5, 2)}
    checks: list[Any] = []
    setting = setting_of(group, "n")
    assert setting is not None and list(setting.parts) == [0]
    m, (n, two) = symbolic(setting_of(group, "m"), checks), symbolic(setting, checks)  # type: ignore[arg-type]
    assert two == 2 and not checks
    formula = lambda m, n: (1 - m) * 2 / m + m**2 - -n + 2**n + (n - 1) * (1 / n) + (3 + n)
    found = formula(m, n)
    assert found.node.hint == formula(0.75, 0.5)
    group["m"], group["n"] = 0.25, (1.5, 2)
    assert found.node.find() == formula(0.25, 1.5) and all(c.holds() for c in checks)
    group["m"] = 0.0
    assert not all(c.holds() for c in checks)  # Python would refuse to divide by it
    for question in (lambda m: m > 0.7, lambda m: 0 <= m < 1, bool, lambda m: m != 0, lambda m: m <= 0.75):
        checks.clear()
        group["m"] = 0.75
        assert question(m) is question(0.75)
        for value in (0.75, 0.8, 0.6, 0.0, 1.5, -1.0):
            group["m"] = value
            assert all(c.holds() for c in checks) is (question(value) is question(0.75))
    checks.clear()
    assert float(n + 1) == 1.5 and repr(n) == "0.5"
    (check,) = checks
    assert not check.holds()
    group["n"] = (0.5, 2)
    assert check.holds() and check.settings == {setting}
