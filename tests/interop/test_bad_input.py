"""Mistakes around compiled functions: what is used disappears, is overwritten, escapes, calls itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torchax
from torchax.errors import BufferDonated, TracerEscaped

VARIABLE = torch.ones(2)


def test_variables_that_are_replaced_or_deleted() -> None:
    global VARIABLE
    VARIABLE = torch.ones(2, device="jax")
    closed, listed = torch.ones(2, device="jax"), [torch.ones(2, device="jax")]

    class Holder:
        def __init__(self) -> None:
            self.weight, self.model = torch.ones(2, device="jax"), nn.Linear(2, 1).to("jax")

    holder = Holder()

    def fn(x: torch.Tensor) -> Any:
        return x * VARIABLE, x * closed, x * listed[0], x * holder.weight, holder.model(x)

    compiled = torchax.compile(fn)
    x = torch.ones(2, device="jax")
    compiled(x)
    compiled(x)
    assert compiled.cache_info()[:2] == (1, 1)
    two = torch.full((2,), 2.0, device="jax")

    def check(words: str) -> None:
        torch.testing.assert_close(compiled(x), fn(x))
        assert words in compiled.cache_info().reasons[-1]

    VARIABLE = two
    check("'VARIABLE' is another tensor")
    closed = two
    check("closes over")
    listed[0] = two
    check("a list of tensors")
    holder.weight = two
    check("'weight' is another tensor")
    holder.model = nn.Linear(2, 1).to("jax")
    check("'model' is another Linear")
    assert compiled.cache_info().misses == 6
    del VARIABLE
    with pytest.raises(NameError, match="VARIABLE"):
        compiled(x)
    VARIABLE = two
    torch.testing.assert_close(compiled(x), fn(x))


def test_a_variable_that_the_function_replaces() -> None:
    state = torch.ones((), device="jax")

    @torchax.compile
    def fn() -> torch.Tensor:
        nonlocal state
        state = state * 2
        return state + 0

    assert [fn().item() for _ in range(5)] == [2, 4, 8, 16, 32] and state.item() == 32


def test_reading_what_was_given_away() -> None:
    weight = torch.ones(3, device="jax")
    other = torchax.Tensor(weight.jax())  # the same buffer under another name, which nobody can know of
    bump = torchax.compile(lambda: weight.add_(1))
    bump()
    uses = [
        lambda: other + 1,
        lambda: other.tolist(),
        lambda: torchax.compile(lambda x: x * 2)(other),
        lambda: torchax.compile(lambda: other * 2)(),
    ]
    for use in uses:
        with pytest.raises(BufferDonated, match=r"given away \(donated\) to a compiled function.*donate_state=False"):
            use()
    assert weight.tolist() == [2, 2, 2]
    bump()
    assert weight.tolist() == [3, 3, 3]


def test_backward_after_its_parameter_was_overwritten() -> None:
    weight = nn.Parameter(torch.ones(3, device="jax"))
    forward = torchax.compile(lambda x: (x * weight).sin())

    @torchax.compile
    def overwrite() -> None:
        with torch.no_grad():
            weight.mul_(2)

    x = torch.ones(3, device="jax", requires_grad=True)
    y = forward(x)
    overwrite()
    with pytest.raises(BufferDonated, match="the backward of a compiled function needs a value"):
        y.sum().backward()
    assert x.grad is None and weight.grad is None
    forward(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.cos(torch.full((3,), 2.0, device="jax")))


def test_a_tensor_that_escaped_from_a_trace_that_failed() -> None:
    kept: list[torch.Tensor] = []

    @torchax.compile
    def fails(x: torch.Tensor) -> torch.Tensor:
        kept.append(x * 2)
        raise ValueError("stop")

    x = torch.ones(2, device="jax")
    with pytest.raises(ValueError, match="stop"):
        fails(x)
    returns = torchax.compile(lambda x: kept[0])
    for use in (lambda: returns(x), lambda: torchax.compile(lambda x: (x, kept[0] + x))(x)):
        with pytest.raises(TracerEscaped, match="tracing"):
            result = use()
            result.tolist()


def test_recursion() -> None:
    @torchax.compile
    def power(x: torch.Tensor, n: int) -> torch.Tensor:
        return x if n == 0 else x * power(x, n - 1)

    @torchax.compile
    def endless(x: torch.Tensor) -> torch.Tensor:
        return endless(x) + 1

    x = torch.full((2,), 2.0, device="jax")
    assert power(x, 3).tolist() == [16, 16] and power.cache_info().misses == 1
    with pytest.raises(RecursionError):
        endless(x)
    assert power(x, 2).tolist() == [8, 8]


def test_a_scheduler_inside() -> None:
    model = nn.Linear(2, 1).to("jax")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    @torchax.compile
    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        scheduler.step()

    before = model.weight.clone()
    with pytest.raises(RuntimeError, match=r"StepLR\.step\(\).*test_bad_input.*outside"):
        step(torch.ones(2, 2, device="jax"))
    assert optimizer.param_groups[0]["lr"] == 0.1 and scheduler.last_epoch == 0 and torch.equal(model.weight, before)
    assert model.weight.grad is None
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
