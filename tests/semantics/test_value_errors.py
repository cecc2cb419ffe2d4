"""Errors that depend on values: raised as CPU torch does, at the latest when this thread next brings a value to the host."""

from __future__ import annotations

import threading

import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
import torchax
from torchax import plugins
from torchax.interop import jax_jit
from torchax.ops import lowering, raise_if

from helpers import assert_same

I5, NEGATIVE = torch.tensor([0, 5]), torch.tensor([-5])
X = torch.arange(12.0).view(3, 4)
ROW = torch.tensor([[5]])
TARGET = torch.tensor([0, 4, 1])
INT = torch.tensor([4])
ZERO = torch.tensor([0])

CASES = {
    "x[i]": lambda x, i, n, row, target, a, zero: x[i],
    "x[n]": lambda x, i, n, row, target, a, zero: x[n],
    "x[:, i]": lambda x, i, n, row, target, a, zero: x[:, i],
    "x[i] = 1": lambda x, i, n, row, target, a, zero: x.clone().__setitem__(i, 1.0),
    "index_select": lambda x, i, n, row, target, a, zero: x.index_select(0, i),
    "gather": lambda x, i, n, row, target, a, zero: x.gather(0, row),
    "scatter": lambda x, i, n, row, target, a, zero: x.scatter(0, row, 1.0),
    "scatter_add_": lambda x, i, n, row, target, a, zero: x.clone().scatter_add_(0, row, x),
    "index_add": lambda x, i, n, row, target, a, zero: x.index_add(0, i, x[:2]),
    "index_copy": lambda x, i, n, row, target, a, zero: x.index_copy(0, i, x[:2]),
    "index_fill": lambda x, i, n, row, target, a, zero: x.index_fill(0, i, 1.0),
    "take": lambda x, i, n, row, target, a, zero: x.take(i * 3),
    "put": lambda x, i, n, row, target, a, zero: x.put(i * 3, x[0, :2]),
    "embedding": lambda x, i, n, row, target, a, zero: F.embedding(i, x),
    "embedding with gradients": lambda x, i, n, row, target, a, zero: F.embedding(i, x.clone().requires_grad_()),
    "embedding_bag": lambda x, i, n, row, target, a, zero: F.embedding_bag(i, x, zero),
    "cross_entropy": lambda x, i, n, row, target, a, zero: F.cross_entropy(x, target),
    "one_hot": lambda x, i, n, row, target, a, zero: F.one_hot(i, 3),
    "floor_divide": lambda x, i, n, row, target, a, zero: a // zero,
    "remainder": lambda x, i, n, row, target, a, zero: a % zero,
    "div_": lambda x, i, n, row, target, a, zero: a.clone().div_(zero, rounding_mode="trunc"),
    "bernoulli": lambda x, i, n, row, target, a, zero: torch.bernoulli(x),
    "multinomial": lambda x, i, n, row, target, a, zero: torch.multinomial(-x, 1),
    "binary_cross_entropy": lambda x, i, n, row, target, a, zero: F.binary_cross_entropy(x, x),
    "masked_scatter": lambda x, i, n, row, target, a, zero: x.masked_scatter(x >= 0, x[0]),
}


@pytest.fixture(autouse=True)
def _nothing_waits():
    torch.jax.synchronize()
    yield
    torch.jax.synchronize()


@pytest.mark.parametrize("name", CASES)
def test_like_cpu(name):
    arguments = X, I5, NEGATIVE, ROW, TARGET, INT, ZERO
    with pytest.raises(Exception) as cpu:
        CASES[name](*arguments)
    CASES[name](*(t.to("jax") for t in arguments))  # queued, nothing has been looked at
    with pytest.raises(cpu.type, match=r"found in aten::"):
        torch.ones(1, device="jax").item()
    assert torch.ones(1, device="jax").item() == 1  # once


def test_what_needs_no_value_is_raised_at_once():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        INT.to("jax") % 0


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.item(),
        lambda t: t.cpu(),
        lambda t: t.tolist(),
        lambda t: t.numpy(),
        repr,
        lambda t: t.block_until_ready(),
        lambda t: torch.jax.synchronize(),
        lambda t: t.nonzero(),
    ],
)
def test_every_way_to_the_host_looks(read):
    X.to("jax")[NEGATIVE.to("jax")]
    with pytest.raises(IndexError, match="index -5 is out of bounds for dimension 0 with size 3"):
        read(torch.ones((), device="jax"))


def test_valid_indices_raise_nothing():
    x = X.to("jax")
    assert x[torch.tensor([-3, 2], device="jax")].tolist() == [X[0].tolist(), X[2].tolist()]
    target = torch.tensor([0, -100, 3], device="jax")
    assert torch.isfinite(F.cross_entropy(x, target))
    assert (x[:0][torch.zeros(0, dtype=torch.int64, device="jax")]).shape == (0, 4)


def test_debug_mode_looks_at_once():
    with torchax.config.override(eager="debug"), pytest.raises(IndexError, match=r"found in aten::index\.Tensor"):
        X.to("jax")[I5.to("jax")]


def test_loops_that_never_read_are_told():
    x, i = X.to("jax"), I5.to("jax")
    with pytest.raises(IndexError):
        for _ in range(1000):
            x = x[i.clamp(max=5)][:1].expand(3, 4)
    torch.jax.synchronize()


def test_first_of_several_errors_is_raised():
    INT.to("jax") // ZERO.to("jax")
    X.to("jax")[I5.to("jax")]
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError \(found in aten::floor_divide\)"):
        X.to("jax").sum().item()


def test_errors_stay_in_their_thread():
    def bad():
        X.to("jax")[I5.to("jax")]

    thread = threading.Thread(target=bad)
    thread.start()
    thread.join()
    assert torch.ones((), device="jax").item() == 1


def test_compiled_functions_clamp():
    x, i = X.to("jax"), torch.tensor([7, -1, -9], device="jax")
    assert jax_jit(lambda x, i: x[i])(x, i)[:, 0].tolist() == [8, 8, 0]
    assert jax_jit(lambda x, i: x.scatter(0, i[:1, None], -1.0))(x, i).tolist() == X.tolist()


def test_plugins_state_errors():
    lib = torch.library.Library("torchax_value_errors", "DEF")
    lib.define("root(Tensor x) -> Tensor")
    lib.impl("root", torch.empty_like, "Meta")

    @lowering("torchax_value_errors::root", checks=True)
    def root(x):
        raise_if(x < 0, ValueError, "negative")
        return jnp.sqrt(x)

    class Plugin:
        @plugins.hookimpl
        def torchax_register_ops(self, registry):
            for entry in root.__torchax__:
                registry.add(entry)

    plugins.register(Plugin(), "value-errors")
    try:
        op = torch.ops.torchax_value_errors.root
        assert op(torch.tensor([4.0], device="jax")).item() == 2
        result = op(torch.tensor([-4.0, 1.0], device="jax"))
        with pytest.raises(ValueError, match=r"negative \(found in torchax_value_errors::root\)"):
            result.tolist()
    finally:
        plugins.disable("value-errors")
        plugins._found.pop("value-errors")
        lib._destroy()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize(
    "power",
    [
        lambda x: x**-1,
        lambda x: x**-3,
        lambda x: torch.pow(x, -2, out=torch.empty_like(x, dtype=torch.int64)),
        lambda x: torch._foreach_pow([x], -2),
    ],
    ids=["-1", "-3", "out", "foreach"],
)
def test_integers_have_no_negative_powers(power, dtype):
    x = torch.tensor([1, 2]).to(dtype)
    for device in ("cpu", "jax"):
        with pytest.raises(RuntimeError, match="Integers to negative integer powers are not allowed"):
            power(x.to(device))
            torch.jax.synchronize()
    y = x.to("jax")
    assert (y**3).tolist() == (x**3).tolist() and (y**2).dtype == (x**2).dtype
    assert (y**-1.0).tolist() == (x**-1.0).tolist()


def test_powers_of_lists():
    x = [torch.tensor([2.0, 3.0]), torch.tensor([4])]
    y = [t.to("jax") for t in x]
    for exponent in (2, [2, 3], 2.5):
        for got, want in zip(torch._foreach_pow(y, exponent), torch._foreach_pow(x, exponent), strict=True):
            assert_same(got, want)
