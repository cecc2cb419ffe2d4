"""Loops that users write compile nothing more once warm: numbers and positions are operands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchax  # noqa: F401


def _data():
    return torch.arange(512.0).reshape(32, 16).to("jax") / 100 - 2


LOOPS = {
    "x * float": lambda i, x, b: x * (0.5 + i),
    "x + int": lambda i, x, b: x + i,
    "clamp": lambda i, x, b: x.clamp(-1.0 - i, 2.5 + i),
    "fill_": lambda i, x, b: b.fill_(i),
    "pow": lambda i, x, b: x.abs() ** (1.5 + i),
    "x[i]": lambda i, x, b: x[i] + 0,
    "x[-i]": lambda i, x, b: x[-i] + 0,
    "x[i:i + 4]": lambda i, x, b: x[i : i + 4] + 0,
    "x[i::2], one length": lambda i, x, b: x[i : i + 8 : 2] + 0,
    "b[i] = row": lambda i, x, b: b.__setitem__(i, x[i]),
    "b[i:i + 2].add_": lambda i, x, b: b[i : i + 2].add_(1),
    "addcmul": lambda i, x, b: torch.addcmul(x, x, x, value=0.5 * i),
    "add alpha": lambda i, x, b: torch.add(x, x, alpha=i),
    "full": lambda i, x, b: torch.full((4, 4), float(i), device="jax"),
    "arange(i, i + n)": lambda i, x, b: torch.arange(i, i + 5, device="jax"),
    "arange(0, i * 4, i)": lambda i, x, b: torch.arange(0, i * 4, i, device="jax"),
    "x[mask]": lambda i, x, b: x[x < i / 4 - 1].shape,
    "rand": lambda i, x, b: torch.rand(8, device="jax"),
    "uniform_": lambda i, x, b: b.uniform_(-i - 1, i + 1),
    "roll": lambda i, x, b: x.roll(i, 0),
    "dropout": lambda i, x, b: F.dropout(x, 0.3),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_warm_loop_compiles_nothing(name, compile_counter):
    turn, x, b = LOOPS[name], _data(), torch.zeros(32, 16).to("jax")
    for i in range(1, 4):
        turn(i, x, b)
    compile_counter.reset()
    for i in range(4, 12):
        turn(i, x, b)
    assert compile_counter.count == 0


@pytest.mark.parametrize(
    "arguments",
    [(5,), (2, 9), (0, 10, 3), (10, 0, -3), (0, 1, 0.1), (0.5, 3), (3, 3), (-4, 2, 2), (0, 7, 2.5), (0, 2**40, 2**38)],
)
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.int64, torch.int32, torch.bfloat16])
def test_arange_equals_cpu(arguments, dtype):
    if dtype is torch.int32 and max(arguments) > 2**31:
        pytest.skip("does not fit into int32")
    if dtype is torch.int64 and 0.1 in arguments:
        pytest.skip("a step of zero in int64: refused")
    ours, cpu = torch.arange(*arguments, dtype=dtype, device="jax"), torch.arange(*arguments, dtype=dtype)
    assert ours.dtype == cpu.dtype
    torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arguments", [(3, 1), (0, 5, -1), (0, 5, 0), (0, float("inf"))])
def test_arange_refuses_what_cpu_refuses(arguments):
    with pytest.raises(RuntimeError):
        torch.arange(*arguments)
    with pytest.raises(RuntimeError):
        torch.arange(*arguments, device="jax")
