"""Python's own values around a compiled function: numbers in variables and attributes, submodules, hooks, groups of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torchax

SCALE = 2.0


@pytest.fixture
def x() -> torch.Tensor:
    return torch.ones(2, 2, device="jax")


def agrees(compiled: Any, fn: Callable[..., Any], x: torch.Tensor, words: str) -> None:
    """`fn` compiled sees what has changed, says so, and is recorded once for it."""
    misses = compiled.cache_info().misses
    for _ in range(2):
        torch.testing.assert_close(compiled(x), fn(x))
    info = compiled.cache_info()
    assert info.misses == misses + 1 and words in info.reasons[-1], info


def test_variables(x: torch.Tensor) -> None:
    global SCALE
    SCALE, shift, mask = 2.0, 1, None

    def fn(x: torch.Tensor) -> torch.Tensor:
        inner = lambda y: y * SCALE
        return inner(x) + shift if mask is None else inner(x) * mask

    compiled = torchax.compile(fn)
    compiled(x)
    SCALE = 3.0
    agrees(compiled, fn, x, "'SCALE', which the code reads, went from 2.0 to 3.0")
    shift = 5
    agrees(compiled, fn, x, "'shift', which the code reads, went from 1 to 5")
    shift = 5.5
    agrees(compiled, fn, x, "from 5 to 5.5")
    mask = torch.full((2, 2), 7.0, device="jax")
    agrees(compiled, fn, x, "'mask'")
    del SCALE
    with pytest.raises(NameError, match="SCALE"):
        compiled(x)
    SCALE = 2.0


def test_attributes_and_dicts_are_watched_where_the_code_names_them(x: torch.Tensor) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.weight, self.epoch, self.config = 2.0, 0, {"shift": 1.0, "name": "a"}

        def scaled(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

        def fn(self, x: torch.Tensor) -> torch.Tensor:
            return self.scaled(x) + self.config["shift"]

    trainer = Trainer()
    compiled = torchax.compile(trainer.fn)
    compiled(x)
    trainer.weight = 4.0
    agrees(compiled, trainer.fn, x, "'weight', which the code reads, went from 2.0 to 4.0")
    trainer.config["shift"] = 4.0
    agrees(compiled, trainer.fn, x, "'shift'")
    misses = compiled.cache_info().misses
    trainer.epoch, trainer.config["name"] = 1, "b"
    compiled(x)
    assert compiled.cache_info().misses == misses


def test_attributes_of_modules(x: torch.Tensor) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.mode, self.note, self.table = 2.0, "add", "", torch.ones(2, device="jax")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.scale if self.mode == "add" else x * self.scale) + self.table

    model = nn.Sequential(Scaled(), nn.Dropout(0.0)).to("jax")
    compiled = torchax.compile(lambda x: model(x))
    compiled(x)
    model[0].scale = 3.0
    agrees(compiled, model, x, "'scale' of a Scaled, which the code reads, went from 2.0 to 3.0")
    model[0].mode = "multiply"
    agrees(compiled, model, x, "'mode' of a Scaled")
    model[0].table = torch.zeros(2, device="jax")
    agrees(compiled, model, x, "'table' of a Scaled, which the code reads, is another tensor")
    model[1].p = 1.0
    agrees(compiled, model, x, "'p' of a Dropout")
    misses = compiled.cache_info().misses
    model[0].note, model[0].epoch = "read by nobody", 1
    compiled(x)
    assert compiled.cache_info().misses == misses


def test_submodules(x: torch.Tensor) -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.experts[-1].weight)

    model = nn.Sequential(nn.Linear(2, 2), Chosen()).to("jax")
    compiled = torchax.compile(lambda x: model(x))
    compiled(x)
    model[0] = nn.Linear(2, 2).to("jax")
    agrees(compiled, model, x, "submodule")
    model.append(nn.Tanh())
    agrees(compiled, model, x, "submodule")
    model[1].experts.append(nn.Linear(2, 2).to("jax"))
    agrees(compiled, model, x, "submodule")
    model[1].experts[1].weight = nn.Parameter(torch.ones(2, 2, device="jax"))
    agrees(compiled, model, x, "a parameter, buffer or submodule of a module was replaced")


def test_hooks(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).to("jax")
    compiled = torchax.compile(lambda x: model(x))
    compiled(x)
    handle = model[0].register_forward_hook(lambda module, args, out: out * 2)
    agrees(compiled, model, x, "a hook")
    handle.remove()
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled.cache_info().misses == 2, "the first program serves again"

    @torchax.compile
    def step(x: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        model(x).sum().backward()
        return model[0].weight.grad.clone()

    step(x)
    plain = step(x)
    handle = model[0].weight.register_hook(lambda grad: grad * 3)
    torch.testing.assert_close(step(x), 3 * plain)
    handle.remove()
    torch.testing.assert_close(step(x), plain)


def test_parameters_added_to_an_optimizer(x: torch.Tensor) -> None:
    first, second = nn.Parameter(x.clone()), nn.Parameter(x.clone())
    optimizer = torch.optim.SGD([first], 0.5)

    @torchax.compile
    def step() -> None:
        (first.sum() + second.sum()).backward()
        optimizer.step()
        first.grad = second.grad = None

    step()
    step()
    optimizer.add_param_group({"params": [second]})
    step()
    assert first.mean().item() == -0.5 and second.mean().item() == 0.5


def test_a_number_that_the_function_changes(x: torch.Tensor) -> None:
    calls = 0

    @torchax.compile
    def fn(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x * 2

    with pytest.warns(UserWarning, match=r"fn changes 'calls', a Python number .*Count outside"):
        fn(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn(x)
        fn(x[:1])
    assert calls == 2 and fn.cache_info()[:2] == (1, 2)


def test_a_number_that_changes_at_every_call(x: torch.Tensor) -> None:
    beta = 0.0
    fn = torchax.compile(lambda x: x * beta)
    with pytest.warns(
        UserWarning, match=r"'beta', which the code reads, .*for the 8th time. .*tensor on device jax"
    ) as caught:
        for i in range(12):
            beta = float(i)
            assert fn(x)[0, 0].item() == i
    assert len(caught) == 1


def test_the_first_gradients_are_no_reason_to_complain() -> None:
    weight = nn.Parameter(torch.ones(2, device="jax"))
    optimizer = torch.optim.SGD([weight], 0.1)

    @torchax.compile(on_retrace="error")
    def step() -> None:
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()

    for _ in range(4):
        step()
    assert step.cache_info()[:2] == (2, 2)
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.6, device="jax"))


def test_an_average_that_counts_on_cpu() -> None:
    model = nn.Linear(2, 2).to("jax")
    average = torch.optim.swa_utils.AveragedModel(model)

    @torchax.compile
    def update() -> None:
        average.update_parameters(model)

    with pytest.warns(UserWarning, match="changes 'n_averaged', a Python number or a buffer on CPU"):
        update()
