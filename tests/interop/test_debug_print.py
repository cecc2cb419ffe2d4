"""`torchax.debug.print`: values at run time, from every call of a compiled function."""

from __future__ import annotations

from typing import Any

import jax
import pytest
import torch
import torchax


def printed(capfd: Any) -> list[str]:
    jax.effects_barrier()
    return capfd.readouterr().out.splitlines()


def test_prints_at_every_call(capfd: Any) -> None:
    weight = torch.full((2,), 2.0, device="jax")

    @torchax.compile
    def fn(x: torch.Tensor) -> torch.Tensor:
        print("recording")
        torchax.debug.print("x {} n {n}", x[0], n=weight)
        return x * weight

    for i in range(3):
        fn(torch.full((2,), float(i), device="jax"))
    assert printed(capfd) == ["recording", "x 0.0 n [2. 2.]", "x 1.0 n [2. 2.]", "x 2.0 n [2. 2.]"]


def test_prints_gradients_and_in_branches(capfd: Any) -> None:
    class Show(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            torchax.debug.print("gradient {}", g)
            return g

    def shout(x: torch.Tensor) -> torch.Tensor:
        torchax.debug.print("positive {}", x)
        return x * 2

    fn = torchax.compile(lambda x: torch.cond(x.sum() > 0, shout, lambda x: x * 2, (Show.apply(x),)))
    for value in (1.0, -1.0):
        x = torch.full((1,), value, device="jax", requires_grad=True)
        fn(x).sum().backward()
        assert x.grad.tolist() == [2]
        lines = ["positive [1.]", "gradient [2.]"] if value > 0 else ["gradient [2.]"]
        assert printed(capfd) == lines


def test_eagerly_and_mistakes(capfd: Any) -> None:
    torchax.debug.print("{} {} {a}", torch.tensor(2**40, device="jax"), torch.ones(2), a="b")
    assert printed(capfd) == ["1099511627776 [1. 1.] b"]
    with pytest.raises(TypeError, match="format string first"):
        torchax.debug.print(torch.ones(2, device="jax"))
