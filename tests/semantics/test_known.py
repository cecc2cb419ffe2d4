"""Values that are known while a function is traced: what Python may ask for, and what it may not."""

from __future__ import annotations

import jax
import pytest
import torch
import torchax
from torchax import interop
from torchax.errors import TracerEscaped

_COUNT = torch.tensor(3, device="jax")
_TABLE = torch.arange(4, device="jax")


def _positions(x):
    return torch.arange(x.shape[0], device="jax")


@pytest.mark.parametrize(
    "question",
    [
        lambda x: (_positions(x).diff() == 1).all(),
        lambda x: (torch.zeros(2, 3, dtype=torch.int64, device="jax") + 1)[:, -1].sum() == 2,
        lambda x: torch.tensor([1, 2, 3], device="jax").roll(1)[0] == 3,
        lambda x: torch.ones_like(x, dtype=torch.int32).cumsum(0)[2] == 3,
        lambda x: _positions(x).unsqueeze(0).expand(2, -1).amax() == x.shape[0] - 1,
    ],
)
def test_python_may_ask_what_follows_from_numbers(question):
    def f(x):
        if question(x):
            return x + 1
        return x - 1

    x = torch.ones(4, device="jax")
    assert torch.equal(torchax.compile(f)(x), x + 1)


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.sum() > 2,
        lambda x: x.long()[0] + _positions(x)[0] > 0,
        lambda x: _COUNT == 3,
        lambda x: _COUNT + torch.zeros((), dtype=torch.int64, device="jax") == 3,
        lambda x: _TABLE[2] == 2,
        lambda x: (_positions(x) == _TABLE).all(),
        lambda x: torch.randint(0, 2, (2,), device="jax").sum() < 3,
        lambda x: torch.ones(2, device="jax").cumsum(0)[1],  # of floats nothing is known
        lambda x: torch.arange((1 << 20) + 1, device="jax")[1] == 1,  # too large
    ],
)
def test_nothing_else_is_known(question):
    with pytest.raises(TracerEscaped):
        torchax.compile(lambda x: x + 1 if question(x) else x)(torch.ones(4, device="jax"))


def test_a_tensor_that_was_written_is_as_known_as_what_was_written():
    def f(x, other):
        t = _positions(x)
        t[1] = 5
        assert t.tolist() == [0, 5, 2, 3]
        t[2] = other[0]
        with pytest.raises(TracerEscaped):
            t.tolist()
        return t

    x = torch.arange(4, device="jax")
    assert torchax.compile(f)(x, x + 7).tolist() == [0, 5, 7, 3]


def test_jax_gives_what_is_known_and_the_program_does_not_change():
    def f(x, ask):
        p = _positions(x)
        if ask:
            assert not isinstance(p.jax(), jax.core.Tracer)
        assert isinstance(x.jax(), jax.core.Tracer) and isinstance(interop.jax_view(p), jax.core.Tracer)
        return x + p

    x = torch.ones(4, device="jax")
    programs = [jax.make_jaxpr(interop.jax_view(lambda x, ask=ask: f(x, ask)))(x.jax()) for ask in (0, 1)]
    assert str(programs[0]) == str(programs[1])


def test_a_tensor_from_outside_stays_an_input():
    table = torch.arange(4, device="jax")
    add = torchax.compile(lambda x: x + table)
    assert add(torch.zeros(4, device="jax"))[0] == 0
    table += 1
    assert add(torch.zeros(4, device="jax"))[0] == 1
