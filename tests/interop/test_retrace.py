"""Why a compiled function was recorded again, and padding that avoids it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax.errors import Retraced


def reasons(fn: Any) -> tuple[str, ...]:
    return fn.cache_info().reasons


def test_reasons_name_what_is_different() -> None:
    fn = torchax.compile(lambda x, n=1, *, m=None: x * n)
    x = torch.ones(32, 64, device="jax")
    fn(x)
    fn(torch.ones(7, 64, device="jax"))
    assert reasons(fn)[-1] == "argument 0 went from (32, 64) to (7, 64)"
    fn(x, 2)
    assert "2 positional argument(s), before with 1" in reasons(fn)[-1]
    fn(x, 3)
    assert reasons(fn)[-1] == "argument 1 went from 2 to 3 (what is not a tensor is part of the program)"
    fn(x.double(), 3)
    assert reasons(fn)[-1] == "argument 0 went from dtype torch.float32 to dtype torch.float64"
    fn(torch.ones(64, 32, device="jax").t(), 3)
    assert reasons(fn)[-1] == "argument 0 went from strides (64, 1) to strides (1, 32)"
    with torch.no_grad():
        fn(x, 3)
    assert reasons(fn)[-1] == "grad mode went from on to off"
    with torch.autocast("jax", dtype=torch.bfloat16):
        fn(x, 3)
    assert "autocast went from off to torch.bfloat16" in reasons(fn)[-1]
    fn(x.cpu(), 3)
    assert "argument 0 went from device" in reasons(fn)[-1] and "cpu" in reasons(fn)[-1]
    fn(x.clone().requires_grad_(), 3)
    assert "requires_grad=False to requires_grad=True" in reasons(fn)[-1]
    fn(x, 3, m={"a": x})
    assert "keywords ['m']" in reasons(fn)[-1]
    fn(x, 3, m={"a": x.clone()})
    assert reasons(fn)[-1] == "other arguments than before share memory"
    fn(x, 3, m={"a": x[:3].clone()})
    assert reasons(fn)[-1] == "argument 'm'['a'] went from (32, 64) to (3, 64)"
    fn(x, 3, m={"b": x})
    assert reasons(fn)[-1] == "argument 'm' is another nest of tuples, lists and dicts than before"
    assert len(reasons(fn)) == fn.cache_info().misses - 1
    before = fn.cache_info()
    fn(x, 3)
    assert fn.cache_info() == before._replace(hits=before.hits + 1)
    fn.cache_clear()
    assert reasons(fn) == ()


def test_reasons_of_guards() -> None:
    layer = nn.Linear(4, 3).to("jax")
    fn = torchax.compile(lambda x: layer(x))
    x = torch.ones(2, 4, device="jax")
    fn(x)
    layer.eval()
    fn(x)
    layer.weight.requires_grad_(False)
    fn(x)
    layer.weight = nn.Parameter(layer.weight * 2)
    fn(x)
    layer.weight.data = layer.weight.data * 2
    fn(x)
    words = ["training and evaluation", "requires_grad", "was replaced", "another storage"]
    assert len(reasons(fn)) == 4 and all(w in r for w, r in zip(words, reasons(fn), strict=True))


def test_warn_and_error() -> None:
    fn = torchax.compile(lambda x: x + 1, on_retrace="warn")
    fn(torch.ones(3, device="jax"))
    with pytest.warns(UserWarning, match=r"test_retrace\.py.*argument 0 went from \(3,\) to \(4,\)"):
        fn(torch.ones(4, device="jax"))
    fn.on_retrace = "error"
    with pytest.raises(Retraced, match=r"argument 0 went from \(4,\) to \(5,\)"):
        fn(torch.ones(5, device="jax"))
    assert fn(torch.ones(4, device="jax")).tolist() == [2] * 4
    assert fn.cache_info()[:3] == (1, 2, 2)
    with pytest.raises(ValueError, match='"ignore", "warn" or "error"'):
        torchax.compile(lambda x: x, on_retrace="sometimes")


def test_a_training_step_under_error() -> None:
    """The second recording, which finds the optimizer's state, is part of the first."""
    model = nn.Linear(4, 2).to("jax")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    @torchax.compile(on_retrace="error")
    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    x = torch.ones(3, 4, device="jax")
    for _ in range(4):
        step(x)
        scheduler.step()
    assert step.cache_info().misses == 2 and "recorded once more" in reasons(step)[0]
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(Retraced, match="'weight_decay' of an optimizer went from 0 to 0.1"):
        step(x)


def test_a_module_under_error() -> None:
    compiled = torchax.compile(nn.Linear(4, 2).to("jax"), on_retrace="error")
    compiled(torch.ones(3, 4, device="jax"))
    with pytest.raises(Retraced):
        compiled(torch.ones(2, 4, device="jax"))


# ---------------------------------------------------------------------- buckets
def test_padding_to_buckets() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).to("jax")
    fn = torchax.compile(model, dynamic={0: (4, 8)})
    for n in (1, 3, 4, 6, 8, 5, 2):
        x = torch.randn(n, 5, device="jax", requires_grad=True)
        got, want = fn(x), model(x)
        torch.testing.assert_close(got, want)
        (g,) = torch.autograd.grad(got.square().sum(), x)
        (w,) = torch.autograd.grad(want.square().sum(), x)
        torch.testing.assert_close(g, w)
    assert fn.cache_info().misses == 2
    with pytest.raises(ValueError, match="9 elements, more than the largest bucket, 8"):
        fn(torch.ones(9, 5, device="jax"))


def test_a_mask_among_the_arguments_makes_a_mean_right() -> None:
    @torchax.compile(dynamic={0: (8,)})
    def loss(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(x, y, reduction="none") * mask).sum() / mask.sum()

    for n in (3, 7):
        x, y = torch.randn(n, 4), torch.randint(0, 4, (n,))
        got = loss(x.to("jax"), y, torch.ones(n))
        torch.testing.assert_close(got.cpu(), F.cross_entropy(x, y))
    assert loss.cache_info().misses == 1


def test_padded_arguments_that_are_written() -> None:
    @torchax.compile(dynamic={0: (4,)})
    def fn(x: torch.Tensor) -> Any:
        x.mul_(3)
        return x, x.sum(0), {"twice": x * 2}

    for host in (False, True):
        x = torch.ones(3, 2, device="cpu" if host else "jax")
        same, total, rest = fn(x)
        assert same is x and x.tolist() == [[3, 3]] * 3 and total.tolist() == [9, 9]
        assert rest["twice"].shape == (3, 2)


def test_buckets_of_named_arguments() -> None:
    @torchax.compile(dynamic={"tokens": {0: (4,), 1: (8, 16)}, "mask": {1: 16}})
    def fn(tokens: torch.Tensor, table: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return table[tokens]

    table = torch.randn(5, 3, device="jax")  # as large as the ragged dimension, and not padded
    tokens = torch.randint(0, 5, (3, 5), device="jax")
    torch.testing.assert_close(fn(tokens, table), table[tokens])
    assert fn(tokens[:, :2].clone(), table).shape == (3, 2, 3) and fn.cache_info().misses == 1
    with pytest.raises(ValueError, match="must have one size; got 5 and 4"):
        fn(tokens, table, tokens[:, :4].clone())


def test_dynamic_that_makes_no_sense() -> None:
    for dynamic, match in (
        ((4, 8), "is a dict"),
        ({0: ()}, "sizes above zero"),
        ({-1: (4,)}, "counted from 0"),
        ({"x": (4,)}, "dimension: sizes"),
        ({"y": {0: (4,)}}, "'y', which is not an argument of the function; it has x"),
    ):
        with pytest.raises(TypeError, match=match):
            torchax.compile(lambda x: x, dynamic=dynamic)
