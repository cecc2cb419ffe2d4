"""`fori_loop` and `scan`, as users of `jax.lax` call them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax.interop import fori_loop, jax_view, scan

both = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@both
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_and_its_gradients(compiled: bool, reverse: bool) -> None:
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 4).to("jax")
    xs = torch.randn(5, 2, 3, device="jax", requires_grad=True)
    h = torch.randn(2, 4, device="jax", requires_grad=True)

    def looped() -> Any:
        state, outs = h, []
        for x in xs.flip(0) if reverse else xs:
            state = cell(x, state)
            outs.append(state)
        return state, {"out": torch.stack(outs[::-1] if reverse else outs)}

    def scanned() -> Any:
        def turn(state: Any, x: Any) -> Any:
            state = cell(x, state)
            return state, {"out": state}

        return scan(turn, h, xs, reverse=reverse)

    found = []
    for fn in (torchax.compile(scanned) if compiled else scanned, looped):
        carry, ys = fn()
        leaves = [xs, h, *cell.parameters()]
        found.append([carry, ys["out"], *torch.autograd.grad((ys["out"] ** 2).sum() + carry.sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@both
def test_fori_loop(compiled: bool) -> None:
    x = torch.tensor(3.0, device="jax", requires_grad=True)
    power = lambda x: fori_loop(2, 6, lambda i, v: {"v": v["v"] * x + i}, {"v": torch.ones((), device="jax")})["v"]
    run = torchax.compile(power) if compiled else power
    y = run(x)
    assert y.item() == (((3 + 2) * 3 + 3) * 3 + 4) * 3 + 5
    (g,) = torch.autograd.grad(y, x)
    cpu = torch.tensor(3.0, requires_grad=True)
    want = torch.ones(())
    for i in range(2, 6):
        want = want * cpu + i
    assert g.item() == torch.autograd.grad(want, cpu)[0].item()
    assert fori_loop(4, 4, lambda i, v: v + 1, x) is x


@both
def test_turns_known_at_run_time(compiled: bool) -> None:
    total = lambda n: fori_loop(0, n, lambda i, v: v + i, torch.zeros((), dtype=torch.int64, device="jax"))
    run = torchax.compile(total) if compiled else total
    for n in (3, 6, 0):
        assert run(torch.tensor(n, device="jax")).item() == sum(range(n))
    if compiled:
        assert run.cache_info().misses == 1


def test_random_numbers_and_length() -> None:
    x = torch.zeros(64, device="jax")
    last, ys = scan(lambda c, _: (c + 1, F.dropout(c + 1, 0.5)), x, length=3)
    assert last.tolist() == [3] * 64 and ys.shape == (3, 64)
    assert not torch.equal(ys[0] == 0, ys[1] == 0)
    with pytest.raises(ValueError, match="needs xs, or the number of turns"):
        scan(lambda c, _: (c, c), x)
    with pytest.raises(ValueError, match=r"length=3 and xs of \[2\] rows"):
        scan(lambda c, _: (c, c), x, x.view(2, 32), length=3)
    with pytest.raises(RuntimeError, match="combine_fn"):
        scan(lambda c, _: (c[:1], c), x, length=3)


def test_under_jax() -> None:
    power = jax_view(lambda x: fori_loop(0, 3, lambda i, v: v * x, torch.ones((), device="jax")))
    np.testing.assert_allclose(jax.jit(jax.grad(power))(jnp.float32(2)), 12)
    np.testing.assert_allclose(jax.vmap(power)(jnp.arange(3.0)), [0, 1, 8])
