"""Bad input: every mistake gives a clear exception and leaves things as they were."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax.errors import DataDependentShape, TracerEscaped
from torchax.interop import jax_jit, jax_view

WAYS = {
    "compile": lambda fn: lambda: torchax.compile(fn)(torch.ones(3, device="jax")),
    "jax_jit": lambda fn: lambda: jax_jit(fn)(torch.ones(3, device="jax")),
    "jax_view under jit": lambda fn: lambda: jax.jit(jax_view(fn))(jnp.ones(3)),
}
VALUES: dict[str, Any] = {
    "if": lambda x: x if x.sum() > 0 else -x,
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x.tolist() and x,
    "numpy": lambda x: x + torch.from_numpy(x.numpy()).sum(),
    "float": lambda x: x * float(x[0]),
    "cpu": lambda x: x.cpu(),
    "assert": lambda x: F.one_hot(x.long()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", [k for k in VALUES if k != "assert"])
def test_values_of_a_traced_tensor(what: str, way: str) -> None:
    with pytest.raises(TracerEscaped, match=r"being traced.*test_errors\.py"):
        WAYS[way](VALUES[what])()


@pytest.mark.parametrize("way", WAYS)
def test_shapes_that_depend_on_values(way: str) -> None:
    for fn in (lambda x: x[x > 0], lambda x: x.nonzero()):
        with pytest.raises(DataDependentShape):
            WAYS[way](fn)()


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_that_escaped(way: str) -> None:
    kept: list[torch.Tensor] = []

    def leak(x: torch.Tensor) -> torch.Tensor:
        kept.append(x * 2)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        WAYS[way](leak)()
    for use in (
        lambda t: t + 1,
        lambda t: t.tolist(),
        lambda t: torchax.compile(lambda x: x + t)(torch.ones(3, device="jax")),
    ):
        with pytest.raises(TracerEscaped, match="tracing"):
            use(kept[0])


def test_a_tensor_kept_from_jax_view() -> None:
    kept: list[torch.Tensor] = []
    jax.jit(jax_view(lambda x: kept.append(x * 2) or x))(jnp.ones(2))
    with pytest.raises(TracerEscaped, match="tracing"):
        kept[0] + 1


def make(dropout: float = 0.5) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(dropout)).to("jax")
    return model, torch.optim.AdamW(model.parameters(), 0.01)


@pytest.mark.parametrize("trained", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("place", ["forward", "loss", "after backward", "after step", "in backward"])
def test_exceptions_while_recording_change_nothing(place: str, trained: bool) -> None:
    model, optimizer = make()
    x = torch.randn(8, 4, device="jax")

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            raise ValueError("in backward")

    def step(x: torch.Tensor, fail: str) -> torch.Tensor:
        optimizer.zero_grad()
        y = model[0](x)
        if fail == "forward":
            raise ValueError(fail)
        y = model[2](model[1](y))
        if fail == "in backward":
            y = Fails.apply(y)
        if fail == "loss":
            raise ValueError(fail)
        y.square().sum().backward()
        if fail == "after backward":
            raise ValueError(fail)
        optimizer.step()
        if fail == "after step":
            raise ValueError(fail)
        return y.detach()

    if trained:
        step(x, "never")
        step(x, "never")
    compiled = torchax.compile(step)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    states = {p: dict(s) for p, s in optimizer.state.items()}
    rng = torch.jax.get_rng_state()
    group = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=place):
        compiled(x, place)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.jax.get_rng_state(), rng)
    assert set(optimizer.state) == set(states)
    for p, s in states.items():
        assert all(optimizer.state[p][k] is v for k, v in s.items())
    assert {k: v for k, v in optimizer.param_groups[0].items()} == group
    assert not torch.compiler.is_compiling()
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k])
    twin, other = make()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the tensors

    for _ in range(3):  # and it goes on as if nothing had been
        state = torch.jax.get_rng_state()
        got = compiled(x, "never")
        torch.jax.set_rng_state(state)
        other.zero_grad()
        want = twin(x)
        want.square().sum().backward()
        other.step()
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_exception_in_the_backward_of_a_jax_function() -> None:
    @jax.custom_vjp
    def bad(x: Any) -> Any:
        return x

    def refuse(res: Any, g: Any) -> Any:
        raise ValueError("no gradient here")

    bad.defvjp(lambda x: (x, None), refuse)
    x = torch.ones(2, device="jax", requires_grad=True)
    y = torchax.interop.call_jax(bad, x)
    with pytest.raises(ValueError, match="no gradient here"):
        y.sum().backward()
    assert x.grad is None


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(TypeError, match="takes a function or a module"):
        torchax.compile(3)
    with pytest.raises(TypeError, match="unknown option"):
        torchax.compile(lambda x: x, fullgraf=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = torchax.interop.nothing
    with pytest.raises(RuntimeError, match="same device"):
        torchax.compile(lambda x: x + torch.ones(3, device="cpu"))(torch.ones(3, device="jax"))


def test_interop_that_is_not_installed() -> None:
    from helpers import run_python

    run_python(
        "import sys\n"
        "sys.modules['torchax_interop'] = None\n"
        "import torchax\n"
        "try:\n"
        "    torchax.compile\n"
        "except ImportError as error:\n"
        "    assert 'pip install torchax-interop' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
    )
