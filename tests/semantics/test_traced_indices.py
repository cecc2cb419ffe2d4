"""Integer tensors without dimensions as indices in compiled functions: views and writes at a traced position."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchax

from helpers import assert_same

READS = {
    "row": lambda x, i: x[i],
    "column": lambda x, i: x[:, i],
    "last": lambda x, i: x[..., i],
    "with a slice": lambda x, i: x[i, 1:3],
    "with None": lambda x, i: x[None, i, :, None],
    "with a list": lambda x, i: x[i, [0, 2]],
    "with a tensor": lambda x, i: x[torch.tensor([0, 1]), i],
    "with a number": lambda x, i: x[1, i],
    "twice": lambda x, i: x[i, i],
    "computed": lambda x, i: x[i - 3],
    "of a view": lambda x, i: x.t()[1:][i - 1],
    "after a mask": lambda x, i: x[:, None, :][i, 0],
}


def _write(x, i, v):
    x[i] = v


def _add(x, i, v):
    x[i] += v


def _column(x, i, v):
    x[1:, i] = v[1:]


def _number(x, i, v):
    x[i] = 7


def _part(x, i, v):
    x[i, 1:3] *= 2
    x[..., 1:2, i] -= 1


def _through_a_view(x, i, v):
    x[i].add_(v)
    x[i][1:].zero_()


def _of_a_view(x, i, v):
    x.t()[1:][i - 1].copy_(v)


def _shift(x, i, v):
    x[i] = x[i - 1] + x[i, [1, 0, 3, 2]]


WRITES = [_write, _add, _column, _number, _part, _through_a_view, _of_a_view, _shift]
COMPILERS = {"compile": torchax.compile, "jax_jit": torchax.interop.jax_jit}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", READS)
def test_reads(name, compiler, compile_counter):
    read, compiled = READS[name], COMPILERS[compiler](READS[name])
    x = torch.arange(16.0).reshape(4, 4)
    y = x.to("jax")
    for i in (1, 3):
        assert_same(compiled(y, torch.tensor(i, device="jax")), read(x, torch.tensor(i)))
    compile_counter.reset()
    with compile_counter.expect(0):
        got = compiled(y, torch.tensor(2, device="jax"))
    assert_same(got, read(x, torch.tensor(2)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("write", WRITES, ids=lambda w: w.__name__)
def test_writes(write, compiler, dtype):
    def step(x, i, v):
        x = x * 1
        write(x, i, v)
        return x, x.sum(0)

    compiled = COMPILERS[compiler](step)
    x, v = torch.arange(16.0).reshape(4, 4), torch.tensor([5.0, 6, 7, 8])
    for i in (1, 2, 3):
        got = compiled(x.to("jax"), torch.tensor(i, dtype=dtype, device="jax"), v.to("jax"))
        assert_same(got, step(x, torch.tensor(i, dtype=dtype), v))


def test_writes_into_an_argument():
    def step(cache, i, row):
        cache[i] = row
        return cache[:2].sum()

    compiled = torchax.compile(step)
    cache, other = torch.zeros(4, 3), torch.zeros(4, 3, device="jax")
    for i in (0, 2, 1):
        row = torch.full((3,), i + 1.0)
        want = step(cache, torch.tensor(i), row)
        assert_same(compiled(other, torch.tensor(i, device="jax"), row.to("jax")), want)
        assert_same(other, cache)


def test_gradients():
    def loss(x, i, v):
        y = x * 1
        part = (y[i] * 3).sum() + y[1:, i].exp().sum()
        y[i] = v
        y[i, 1:] += v[1:]
        y[:, i] *= 2
        return part + y.square().sum()

    x, v = torch.rand(4, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    loss(x, torch.tensor(2), v).backward()
    a, b = (t.detach().to("jax").requires_grad_() for t in (x, v))

    def step(i):
        loss(a, i, b).backward()

    compiled = torchax.compile(step)
    for _ in range(3):
        a.grad = b.grad = None
        compiled(torch.tensor(2, device="jax"))
        assert_same(a.grad, x.grad, rtol=1e-5, atol=1e-6)
        assert_same(b.grad, v.grad, rtol=1e-5, atol=1e-6)


def test_too_many_indices():
    with pytest.raises(IndexError, match="too many indices"):
        torchax.compile(lambda x, i: x[i, i, i])(torch.ones(2, 2, device="jax"), torch.tensor(0, device="jax"))


def test_eager_indexing_does_not_pass_python():
    program = (
        "import torch, torchax\n"
        "x = torch.ones(3, device='jax'); x[0] = 2; x[torch.tensor(1, device='jax')] += 1\n"
        "assert x.tolist() == [2, 2, 1] and '__getitem__' not in vars(torchax.tensor.Tensor)\n"
        "torchax.compile(lambda x: x + 1)(x)\n"
        "assert '__getitem__' in vars(torchax.tensor.Tensor) and x[torch.tensor(0, device='jax')] == 2 and len(list(x)) == 3\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
