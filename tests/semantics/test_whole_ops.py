"""Composite ops kept whole: gradients, also complex and second ones, and lowerings that come late."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
import torchax
from torch.utils._python_dispatch import TorchDispatchMode
from torchax.ops import Lowering


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derived_backward_follows_torchs_convention(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(3, 3, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    grads = []
    for device in ("cpu", "jax"):
        x = a.detach().clone().to(device).requires_grad_()
        torch.linalg.solve(x, b.to(device)).abs().sum().backward()
        assert x.grad is not None
        grads.append(x.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0])


def test_second_derivatives():
    torch.manual_seed(0)
    w0, x0 = torch.randn(4, 3), torch.randn(2, 3)
    found = []
    for device in ("cpu", "jax"):
        w = w0.clone().to(device).requires_grad_()
        (g,) = torch.autograd.grad((F.linear(x0.to(device), w) ** 3).sum(), w, create_graph=True)
        g.square().sum().backward()
        assert w.grad is not None
        found.append(w.grad.cpu())
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("call", [lambda a, b: a @ b, lambda a, b: torch.mm(a, b), F.linear])
def test_products_refuse_mixed_dtypes(call):
    a, b = torch.ones(3, 3), torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="dtype"):
        call(a, b)
    with pytest.raises(RuntimeError, match=r"same dtype, but got: float != double"):
        call(a.to("jax"), b.to("jax"))


class Late:
    """A plugin that keeps an op whole which nobody kept whole before."""

    @torchax.hookspecs.hookimpl
    def torchax_register_ops(self, registry):
        registry.add(
            Lowering(
                op="aten::cosine_similarity", fn=lambda x, y, dim=1, eps=1e-8: jnp.full(x.shape[:-1], 7.0), whole=True
            )
        )


def test_a_whole_lowering_that_fails_says_why_with_and_without_gradients():
    class Wrong:
        @torchax.hookspecs.hookimpl
        def torchax_register_ops(self, registry):
            registry.add(Lowering(op="aten::cosine_similarity", fn=lambda x, y, dim=1, eps=1e-8: x, whole=True))

    torchax.plugins.register(Wrong(), "wrong-shape")
    try:
        for requires_grad in (False, True):
            x = torch.ones(2, 3, device="jax", requires_grad=requires_grad)
            with pytest.raises(torchax.errors.LoweringError, match=r"gave shape \[2, 3\] where torch gives \[2\]"):
                F.cosine_similarity(x, x)
    finally:
        torchax.plugins.disable("wrong-shape")


def test_a_whole_lowering_of_a_late_plugin():
    x = torch.randn(2, 3).to("jax").requires_grad_()
    torchax.plugins.register(Late(), "late")
    try:
        assert F.cosine_similarity(x, x).tolist() == [7, 7]
    finally:
        torchax.plugins.disable("late")
    torch.testing.assert_close(F.cosine_similarity(x, x).cpu(), torch.ones(2))


def test_a_composite_lowering_calls_other_ops_before_autograd():
    """It draws random numbers, which a whole lowering of arrays cannot, and has the gradients of its parts."""

    def noisy(x, y, dim=1, eps=1e-8):
        return (x * y).sum(dim) + torch.rand(x.shape[0], device=x.device)

    class Composite:
        @torchax.hookspecs.hookimpl
        def torchax_register_ops(self, registry):
            registry.add(Lowering(op="aten::cosine_similarity", fn=noisy, whole=True, kind="composite"))

    x = torch.ones(2, 3, device="jax", requires_grad=True)
    torchax.plugins.register(Composite(), "composite")
    try:
        torch.manual_seed(0)
        found = [F.cosine_similarity(x, x) for _ in range(2)]
        with torch.inference_mode():
            found.append(F.cosine_similarity(x, x))
        compiled = torchax.compile(F.cosine_similarity)
        found += [compiled(x, x) for _ in range(2)]
        assert len({tuple(t.tolist()) for t in found}) == 5 and all(((t >= 3) & (t < 4)).all() for t in found)
        for t in (found[0], found[4]):
            (g,) = torch.autograd.grad(t.sum(), x)
            assert (g == 2).all()
    finally:
        torchax.plugins.disable("composite")


def test_a_dispatch_mode_sees_the_ops_that_it_sees_on_cpu():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    products = {}
    for device in ("cpu", "jax", "jax"):  # the second time, nothing is resolved any more
        x, seen = torch.ones(2, 3, 5, device=device), []
        with Seen():
            x @ x.mT
            F.linear(x[0], x[1])
        products[device] = seen
        assert [s for s in seen if "mm" in s] == [s for s in products["cpu"] if "mm" in s]
        assert not any("empty" in s or "ones" in s for s in seen)  # what stands in for the operands is not the user's
