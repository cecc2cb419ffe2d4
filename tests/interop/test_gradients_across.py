"""Gradients that cross the border of a compiled function: into arguments, and into what was computed before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchax


def both(program: Callable[[str, Any], list[torch.Tensor]]) -> None:
    """`program` of a device and a compiler gives the same on CPU and compiled."""
    for got, want in zip(program("jax", torchax.compile), program("cpu", lambda fn: fn), strict=True):
        torch.testing.assert_close(got.cpu(), want)


def test_backward_inside_gives_arguments_their_gradients() -> None:
    def program(device: str, compiler: Any) -> list[torch.Tensor]:
        weight = torch.nn.Parameter(torch.arange(3.0, device=device))
        x = torch.ones(3, device=device, requires_grad=True)

        @compiler
        def step(x: torch.Tensor) -> torch.Tensor:
            loss = (x * weight).pow(2).sum()
            loss.backward()
            return loss.detach()

        found = []
        for _ in range(3):
            loss = step(x)
            assert x.grad is not None and weight.grad is not None
            found += [loss, x.grad.clone(), weight.grad.clone()]
        return found

    both(program)


def test_backward_inside_goes_on_behind_arguments() -> None:
    def program(device: str, compiler: Any) -> list[torch.Tensor]:
        before = torch.nn.Parameter(torch.ones(3, device=device))

        @compiler
        def step(x: torch.Tensor) -> None:
            x.pow(3).sum().backward()

        for _ in range(3):
            step(before * 2)
        assert before.grad is not None
        return [before.grad]

    both(program)


def test_results_are_differentiable_by_what_was_computed_outside() -> None:
    def program(device: str, compiler: Any) -> list[torch.Tensor]:
        before = torch.nn.Parameter(torch.ones(3, device=device))
        weight = torch.nn.Parameter(torch.arange(3.0, device=device))
        hidden = before * 2

        @compiler
        def fn(x: torch.Tensor) -> torch.Tensor:
            return (hidden[1:] * x * weight[1:]).sum()

        for _ in range(3):
            fn(torch.ones(2, device=device)).backward(retain_graph=True)
        assert before.grad is not None and weight.grad is not None
        return [before.grad, weight.grad]

    both(program)


class _Doubled(torch.autograd.Function):
    """A node whose backward takes what is not there for zeros."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: (w * 2, w + 1),
        lambda w: (h := w.exp(), h * w),
        lambda w: torch.var_mean(torch.stack([w, w.exp()]), 0),
        lambda w: (_Doubled.apply(w), w.exp()),
    ],
    ids=["side by side", "in a row", "one node", "custom"],
)
def test_what_was_computed_from_what_is_used_too(compute: Any) -> None:
    def program(device: str, compiler: Any) -> list[torch.Tensor]:
        weight = torch.nn.Parameter(torch.arange(1.0, 5.0, device=device))
        first, second = compute(weight)

        @compiler
        def fn(x: torch.Tensor) -> torch.Tensor:
            return (first * second * weight * x).sum()

        found = []
        for k in range(3):
            x = torch.full((4,), float(k), device=device, requires_grad=True)
            found += torch.autograd.grad(fn(x), [x, weight, first, second], retain_graph=True)
        fn(torch.ones(4, device=device)).backward()
        assert weight.grad is not None
        return [*found, weight.grad]

    both(program)


@pytest.mark.parametrize(
    "view",
    [
        lambda p, h, x: p[1:],
        lambda p, h, x: h.view(2, 2),
        lambda p, h, x: x[1:],
        lambda p, h, x: x.reshape(2, 2).t()[1:],
        lambda p, h, x: p.detach()[1:],
    ],
    ids=["parameter", "computed", "argument", "views of views", "detached"],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_results_that_are_views_alias_and_have_gradients(view: Any, requires_grad: bool) -> None:
    def program(device: str, compiler: Any) -> list[torch.Tensor]:
        parameter = torch.nn.Parameter(torch.arange(4.0, device=device))
        hidden = parameter * 2
        x = torch.arange(4.0, device=device).requires_grad_(requires_grad)
        fn = compiler(lambda x: (view(parameter, hidden, x), (x * 3).sum()))
        found: list[torch.Tensor] = []
        for _ in range(2):
            y, total = fn(x)
            if y.requires_grad:
                loss = (y * y.detach()).sum() + (total if requires_grad else 0)
                leaves = [t for t in (parameter, x) if t.requires_grad]
                grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
                found += [torch.zeros(4) if g is None else g for g in grads]
            with torch.no_grad():
                y.add_(1)
                found += [t.detach().clone() for t in (y, parameter, hidden, x)]
                parameter.sub_(2)
                found.append(y.detach().clone())
        return found

    both(program)


def test_a_view_of_a_parameter_follows_requires_grad() -> None:
    parameter = torch.nn.Parameter(torch.arange(4.0, device="jax"), requires_grad=False)
    fn = torchax.compile(lambda: parameter[1:])
    assert not fn().requires_grad
    parameter.requires_grad_()
    assert fn().requires_grad
