"""Python's operators take a short way to their rule; whoever stands on the long one must not notice."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torchax
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import assert_same

OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul]
INPLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv]
METHODS = ["add_", "sub_", "mul_", "div_"]


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 3), torch.randn(3, 3)


@pytest.mark.parametrize("op", OPERATORS)
def test_tensors(op):
    a, b = _pair()
    assert_same(op(a.to("jax"), b.to("jax")), op(a, b), layout=True)
    assert_same(op(a.to("jax").t(), b.to("jax")), op(a.t(), b), layout=True)


@pytest.mark.parametrize("op", OPERATORS[:4])
@pytest.mark.parametrize("number", [2, 2.5, True, -3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_numbers(op, number, dtype):
    if op is operator.sub and number is True:
        pytest.skip("torch refuses to subtract a bool")
    a = torch.arange(1, 5).to(dtype)
    assert_same(op(a.to("jax"), number), op(a, number))
    assert_same(op(number, a.to("jax")), op(number, a))


@pytest.mark.parametrize("op", INPLACE)
@pytest.mark.parametrize("other", ["tensor", 3])
def test_in_place(op, other):
    a, b = _pair()
    base = a.to("jax")
    view, alias = base[1:], base.view(-1)
    cpu = a.clone()
    result = op(view, b.to("jax")[1:] if other == "tensor" else other)
    op(cpu[1:], b[1:] if other == "tensor" else other)
    assert result is view
    assert_same(base, cpu)
    assert_same(alias, cpu.view(-1))


@pytest.mark.parametrize("name", METHODS)
def test_in_place_counts_versions(name):
    a, b = (x.to("jax") for x in _pair())
    for count in (1, 2, 3):
        assert getattr(a, name)(b) is a
        assert a._version == count
    getattr(a, name)(
        b, **({"alpha": 2} if name in ("add_", "sub_") else {"rounding_mode": "floor"} if name == "div_" else {})
    )
    assert a._version == 4


def test_in_place_is_refused_before_anything_changes():
    a = torch.arange(4).to("jax")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can't be cast"):
            a /= 2
        with pytest.raises(RuntimeError):
            a += torch.ones(2, 4, dtype=torch.int64).to("jax")
    assert a.tolist() == [0, 1, 2, 3]
    expanded = torch.ones(1).to("jax").expand(3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="single memory location"):
            expanded += 1


def test_autograd_records():
    a, b = (x.to("jax").requires_grad_() for x in _pair())
    (a * b + a - b / 2 @ a).sum().backward()
    x, y = (t.detach().cpu().requires_grad_() for t in (a, b))
    (x * y + x - y / 2 @ x).sum().backward()
    assert_same(a.grad, x.grad)
    assert_same(b.grad, y.grad)
    with torch.no_grad():
        assert not (a + b).requires_grad
    with pytest.raises(RuntimeError, match="leaf"):
        a += 1
    kept = b.detach().clone()
    out = (a * kept).sum()
    kept.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_inference_tensors_keep_their_rules():
    with torch.inference_mode():
        a = torch.ones(2, device="jax") + 1
        assert a.is_inference()
        a += 1
    assert a.tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="outside InferenceMode"):
        a.add_(1)


def test_modes_see_operators():
    a, b = (x.to("jax") for x in _pair())
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Functions():
        a + b
    assert [f.__name__ for f in seen] == ["add"]
    seen.clear()
    with Ops():
        a + b
        a *= 2
    assert seen == [torch.ops.aten.add.Tensor, torch.ops.aten.mul_.Tensor]
    with torch.profiler.profile() as profile:
        a + b
    assert "aten::add" in {event.name for event in profile.events()}


def test_transforms_see_operators():
    a, b = (x.to("jax") for x in _pair())
    assert_same(torch.func.grad(lambda x: (x * b + a).sum())(a), b.cpu())
    assert_same(torch.vmap(lambda x: x @ b)(torch.stack([a, b])), torch.stack([a.cpu() @ b.cpu(), b.cpu() @ b.cpu()]))
    with fwAD.dual_level():
        dual = fwAD.make_dual(a, b)
        assert_same(fwAD.unpack_dual(dual * a).tangent, b.cpu() * a.cpu())
    with torch.autocast("jax", dtype=torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        assert (a + b).dtype == torch.float32


def test_other_kinds_of_tensors():
    a, b = _pair()
    with pytest.raises(RuntimeError, match="device"):
        a.to("jax") + b
    assert_same(a.to("jax") + torch.tensor(2.0), a + 2)

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "mine"

    assert a.to("jax") + a.as_subclass(Logged) == "mine"
    with pytest.raises(TypeError):
        a.to("jax") + object()
    assert torchax.Tensor.__add__.__doc__ == torch.Tensor.__add__.__doc__
