"""`register_jax`: custom operators of torch on device jax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchax
from torchax.interop import jax_view, register_jax


@torch.library.custom_op("torchax_tests::squash", mutates_args=())
def squash(x: torch.Tensor, scale: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    return torch.from_numpy(np.tanh(x.numpy()) * scale) * (1 if weight is None else weight)


@register_jax(squash)
def squash_in_jax(x: jax.Array, scale: float, weight: jax.Array | None = None) -> jax.Array:
    return jnp.tanh(x) * scale * (1 if weight is None else weight)


@torch.library.custom_op("torchax_tests::split_sum", mutates_args=())
def split_sum(parts: list[torch.Tensor], *, weight: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    stacked = torch.stack(parts)
    return stacked.sum(0) * weight, stacked.argmax(0)


register_jax(
    "torchax_tests::split_sum", lambda parts, *, weight=1.0: (sum(parts) * weight, jnp.argmax(jnp.stack(parts), 0))
)


@torch.library.custom_op("torchax_tests::accumulate", mutates_args=("total",))
def accumulate(total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    total.add_(x)
    return x.sum()


register_jax(accumulate, lambda total, x: (x.sum(), total + x))


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients(compiled: bool, pair: Any, assert_same: Any) -> None:
    (cpu, x), (_, w) = pair(4, requires_grad=True), pair(4, requires_grad=True)
    run = torchax.compile(squash) if compiled else squash
    assert_same(run(x.detach(), 3.0), squash(cpu.detach(), 3.0))
    run(x, 3.0, w).sum().backward()
    y = (cpu.tanh() * 3.0 * w.detach().cpu()).sum()
    assert_same(x.grad, torch.autograd.grad(y, cpu)[0])
    assert_same(w.grad, cpu.detach().tanh() * 3.0)


def test_second_derivatives_and_jax() -> None:
    x = torch.linspace(-1, 1, 5, device="jax", requires_grad=True)
    (g,) = torch.autograd.grad(squash(x, 2.0).sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), x)
    a = x.detach().jax()
    fn = lambda a: jnp.sum(jnp.tanh(a)) * 2
    np.testing.assert_allclose(gg.jax(), jnp.diag(jax.hessian(fn)(a)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(jax.grad(jax_view(lambda t: squash(t, 2.0).sum())))(a), jax.grad(fn)(a), rtol=1e-5
    )


def test_lists_keywords_and_several_results(pair: Any, assert_same: Any) -> None:
    (ac, a), (bc, b) = pair(3, requires_grad=True), pair(3, requires_grad=True)
    total, where = split_sum([a, b], weight=2.0)
    assert_same((total.detach(), where), split_sum([ac.detach(), bc.detach()], weight=2.0))
    total.sum().backward()
    assert a.grad.tolist() == b.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("compiled", [False, True])
def test_mutated_arguments(compiled: bool) -> None:
    total, x = torch.zeros(4, device="jax"), torch.ones(2, device="jax")
    run = (lambda: accumulate(total[1:3], x)) if not compiled else torchax.compile(lambda: accumulate(total[1:3], x))
    for _ in range(3):
        assert run().item() == 2
    assert total.tolist() == [0, 3, 3, 0]
    with pytest.raises(ValueError, match="mutates total: such an operator cannot have a gradient"):
        register_jax(accumulate, lambda total, x: (x.sum(), total + x), gradient=True)


def test_a_gradient_of_its_own_is_kept() -> None:
    @torch.library.custom_op("torchax_tests::tenfold", mutates_args=())
    def tenfold(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    tenfold.register_fake(torch.empty_like)
    tenfold.register_autograd(lambda ctx, g: g * 10)
    register_jax(tenfold, lambda x: x * 2)
    x = torch.ones(2, device="jax", requires_grad=True)
    tenfold(x).sum().backward()
    assert x.grad.tolist() == [10, 10]
    register_jax(tenfold, lambda x: x * 3, gradient=True)
    assert tenfold(x).tolist() == [3, 3]  # the last one registered counts
    (g,) = torch.autograd.grad(tenfold(x).sum(), x)
    assert g.tolist() == [3, 3]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"no operator 'nobody::here'"):
        register_jax("nobody::here", lambda x: x)
    with pytest.raises(TypeError, match="an overload or its name; got int"):
        register_jax(3, lambda x: x)
    cpu = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"torchax_tests::squash is JAX's and serves tensors on device 'jax' alone"):
        squash(cpu.detach().requires_grad_(), 1.0, torch.ones(2)).sum().backward()
