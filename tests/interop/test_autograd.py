"""Gradients that cross from one world into the other."""

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
from torchax.interop import (
    call_jax,
    extract_jax,
    gradient_checkpoint,
    j2t_autograd,
    jax_value_and_grad,
    jax_view,
    jax_vmap,
    t2j_autograd,
    torch_view,
)


@pytest.mark.parametrize(
    "make",
    [j2t_autograd, torch_view, lambda f: lambda *a: call_jax(f, *a)],
    ids=["j2t_autograd", "torch_view", "call_jax"],
)
def test_first_and_second_derivatives(make: Any, pair: Any, assert_same: Any) -> None:
    fn = make(lambda a, b: jnp.sin(a) * b + a**3)
    (ac, a), (bc, b) = (
        pair(5, dtype=torch.float64, requires_grad=True),
        pair(5, dtype=torch.float64, requires_grad=True),
    )
    got, want = fn(a, b), torch.sin(ac) * bc + ac**3
    assert got.requires_grad
    for y, x, z in ((got, a, b), (want, ac, bc)):
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        g.square().sum().backward()
        assert z.grad is not None
    assert_same(a.grad, ac.grad)
    assert_same(b.grad, bc.grad)


def test_gradgradcheck() -> None:
    fn = j2t_autograd(lambda a, w: jnp.tanh(a @ w))
    a = torch.randn(2, 3, dtype=torch.float64, device="jax", requires_grad=True)
    w = torch.randn(3, 2, dtype=torch.float64, device="jax", requires_grad=True)
    assert torch.autograd.gradcheck(fn, (a, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, (a, w), fast_mode=True)


def test_containers_integers_and_constants() -> None:
    @j2t_autograd
    def fn(nest: Any, index: Any, *, scale: float) -> Any:
        return {"rows": nest["w"][index] * scale, "index": index + 1, "note": "kept"}

    w = torch.randn(4, 2, device="jax", requires_grad=True)
    out = fn({"w": w}, torch.tensor([1, 1, 3], device="jax"), scale=2.0)
    assert out["note"] == "kept" and not out["index"].requires_grad
    out["rows"].sum().backward()
    assert w.grad.tolist() == [[0, 0], [4, 4], [0, 0], [2, 2]]


def test_no_graph_where_none_is_needed() -> None:
    x = torch.ones(3, device="jax", requires_grad=True)
    assert torch_view(jnp.sin)(x).requires_grad
    with torch.no_grad():
        assert not torch_view(jnp.sin)(x).requires_grad
    assert not torch_view(jnp.sin)(x.detach()).requires_grad


def test_complex_gradients(pair: Any, assert_same: Any) -> None:
    cpu, x = pair(4, dtype=torch.complex64, requires_grad=True)
    (x_out,) = torch.autograd.grad(j2t_autograd(lambda z: jnp.abs(z * (1 + 2j)) ** 2)(x).sum(), x)
    (want,) = torch.autograd.grad((cpu * (1 + 2j)).abs().square().sum(), cpu)
    assert_same(x_out, want, rtol=1e-5, atol=1e-5)


def test_torch_func_transforms() -> None:
    fn = torch_view(lambda a: jnp.sin(a).sum(-1))
    x = torch.randn(3, 4, device="jax")
    torch.testing.assert_close(torch.func.grad(lambda a: fn(a).sum())(x), torch.cos(x))
    torch.testing.assert_close(torch.vmap(fn)(x), torch.sin(x).sum(-1))


def test_jax_module_inside_a_torch_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call_jax(lambda a, s: jax.nn.silu(a) * s, self.inner(x), self.scale)

    torch.manual_seed(0)
    net = Net().to("jax")
    x = torch.randn(2, 3)
    net(x.to("jax")).sum().backward()
    got = [p.grad.cpu() for p in net.parameters()]
    net.zero_grad()
    cpu = net.to("cpu")
    (F.silu(cpu.inner(x)) * cpu.scale).sum().backward()
    for g, p in zip(got, cpu.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)


def test_t2j_autograd_keeps_torchs_backward() -> None:
    class Surprising(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * 10

    fn = t2j_autograd(lambda x, n: Surprising.apply(x).sum() + 0 * n.sum())
    x, n = jnp.ones(3), jnp.arange(2)
    assert float(fn(x, n)) == 6
    np.testing.assert_array_equal(jax.jit(jax.grad(fn))(x, n), [10, 10, 10])


def test_jax_value_and_grad() -> None:
    def loss(params: dict[str, Any], x: torch.Tensor) -> Any:
        y = F.linear(x, params["w"], params["b"])
        return y.square().mean(), {"y": y}

    params = {
        "w": torch.randn(2, 3, device="jax", requires_grad=True),
        "b": torch.zeros(2, device="jax", requires_grad=True),
    }
    x = torch.randn(4, 3, device="jax")
    (value, aux), grads = jax_value_and_grad(loss, {"has_aux": True})(params, x)
    want, _ = loss(params, x)
    want.backward()
    torch.testing.assert_close(value, want.detach())
    assert aux["y"].shape == (4, 2) and not value.requires_grad
    for name in params:
        torch.testing.assert_close(grads[name], params[name].grad)


def test_functional_call_under_jax_grad(assert_same: Any) -> None:
    torch.manual_seed(0)
    cpu = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    tokens = torch.randint(0, 7, (2, 5))
    want = F.cross_entropy(cpu(tokens).flatten(0, 1), tokens.flatten())
    want.backward()
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model.load_state_dict(cpu.state_dict())
    model = model.to("jax")
    params = {k: v.detach().jax() for k, v in model.named_parameters()}

    def loss(p: Any, i: Any) -> Any:
        return F.cross_entropy(torch.func.functional_call(model, p, (i,)).flatten(0, 1), i.flatten().long())

    value, grads = jax.jit(jax.value_and_grad(jax_view(loss)))(params, jnp.asarray(tokens.numpy(), jnp.int32))
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    for name, p in cpu.named_parameters():
        np.testing.assert_allclose(grads[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_checkpoint_under_torch(compiled: bool) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4)).to("jax")
    x = torch.randn(3, 4, device="jax")

    def gradients(fn: Any) -> list[torch.Tensor]:
        torch.manual_seed(1)
        block.zero_grad()
        given = x.clone().requires_grad_()
        fn(given).square().sum().backward()
        return [given.grad, *[p.grad.clone() for p in block.parameters()]]

    checkpointed = gradient_checkpoint(block)
    for got, want in zip(
        gradients(torchax.compile(checkpointed) if compiled else checkpointed), gradients(block), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_gradient_checkpoint_under_jax() -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).to("jax")
    states, fn = extract_jax(block)
    _, checkpointed = extract_jax(Wrapper(block))
    x = jnp.ones((2, 4))
    want = jax.grad(lambda s: fn(s, (x,)).sum())(states)
    inner = {f"block.{k}": v for k, v in states.items()}
    got = jax.grad(lambda s: checkpointed(s, (x,)).sum())(inner)
    for name in want:
        np.testing.assert_allclose(got[f"block.{name}"], want[name], rtol=1e-5)
    text = str(jax.make_jaxpr(jax.grad(lambda s: checkpointed(s, (x,)).sum()))(inner))
    assert "remat" in text or "checkpoint" in text


class Wrapper(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gradient_checkpoint(self.block)(x)


# Second derivatives, each world inside of the other -----------------------------------------------------------------
TORCH_INSIDE = {
    "jax_view": jax_view,
    "t2j_autograd": t2j_autograd,
    "torch_view": lambda f: jax_view(torch_view(jax_view(f))),
    "torch.func": lambda f: lambda a: jax_view(lambda t: torch.func.grad(f)(t) * t)(a).sum() / 3,
}


@pytest.mark.parametrize("how", TORCH_INSIDE)
def test_second_derivatives_by_jax(how: str) -> None:
    """f is a sum of cubes, in torch; ``torch.func`` multiplies its gradient by x, which is three times f."""
    f = TORCH_INSIDE[how](lambda t: (t**3).sum())
    a = jnp.linspace(0.5, 1.5, 4)
    np.testing.assert_allclose(jax.grad(f)(a), 3 * a**2, rtol=1e-5)
    second = jax.grad(lambda x: (jax.grad(f)(x) * a).sum())
    np.testing.assert_allclose(second(a), 6 * a**2, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(second)(a), 6 * a**2, rtol=1e-5)
    np.testing.assert_allclose(jax.jacrev(jax.grad(f))(a), np.diag(6 * a), rtol=1e-5)
    if how != "t2j_autograd":  # JAX has no forward mode for functions with a backward of their own
        np.testing.assert_allclose(jax.hessian(f)(a), np.diag(6 * a), rtol=1e-5)


def test_second_derivatives_by_torch() -> None:
    """Gradients that JAX computes inside of torch functions, differentiated by torch; forward mode, too."""
    x = torch.linspace(0.5, 1.5, 4, device="jax", requires_grad=True)
    slope = torch_view(jax.grad(lambda a: (a**3).sum()))
    torch.testing.assert_close(torch.autograd.grad(slope(x).sum(), x)[0], 6 * x.detach())
    (g,) = torch.autograd.grad(torch_view(jax.grad(jax_view(lambda t: (t**4).sum())))(x).sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), x)[0], 24 * x.detach())
    cubes = torch_view(lambda a: (a**3).sum())
    torch.testing.assert_close(torch.func.hessian(cubes)(x.detach()), torch.diag(6 * x.detach()))
    torch.testing.assert_close(
        torch.func.jvp(cubes, (x.detach(),), (torch.ones_like(x),))[1], (3 * x**2).sum().detach()
    )
    twice = jax_value_and_grad(lambda t: jax_value_and_grad(lambda s: (s**3).sum())(t)[1].sum())
    torch.testing.assert_close(twice(x.detach())[1], 6 * x.detach())


def test_t2j_autograd_keeps_torchs_double_backward() -> None:
    class Cube(torch.autograd.Function):
        """Its backward is itself a function with a backward of its own, which is off by ten."""

        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * Square.apply(ctx.saved_tensors[0])

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return 3 * x**2

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * 60 * ctx.saved_tensors[0]

    fn = t2j_autograd(lambda x: Cube.apply(x).sum())
    a = jnp.arange(3.0)
    np.testing.assert_allclose(jax.grad(lambda x: jax.grad(fn)(x).sum())(a), 60 * a)


def test_t2j_autograd_of_complex_numbers() -> None:
    c = 1 + 2j
    by_torch = t2j_autograd(lambda z: (z * c).abs().square().sum() + z.imag.sum())
    a = jnp.array([1 + 1j, 2 - 1j])
    want = jax.grad(lambda z: (jnp.abs(z * c) ** 2).sum() + z.imag.sum())(a)
    np.testing.assert_allclose(jax.grad(by_torch)(a), want, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_reaches_parameters(compiled: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).to("jax")
    scale = torch.ones(2, device="jax", requires_grad=True)
    x = torch.randn(4, 3, device="jax")

    def loss(batched: bool) -> torch.Tensor:
        factor = (scale * 2)[:1]  # a view of what was computed outside
        one = lambda row: layer(row).tanh() * factor
        return (jax_vmap(one)(x) if batched else one(x)).square().sum()

    found = []
    for batched in (True, False):
        for p in (*layer.parameters(), scale):
            p.grad = None
        run = torchax.compile(loss, static_argnums=(0,)) if compiled else loss
        run(batched).backward()
        found.append([p.grad for p in (*layer.parameters(), scale)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_that_get_lost_are_reported() -> None:
    layer = nn.Linear(3, 2).to("jax")
    x = torch.ones(1, 3, device="jax", requires_grad=True)
    with pytest.warns(UserWarning, match=r"uses 2 tensor\(s\) that require a gradient .*extract_jax"):
        call_jax(jax_view(layer), x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


@pytest.mark.parametrize("how", ["torch_view", "jax_vmap", "j2t_autograd", "compiled"])
def test_random_numbers_are_the_same_in_the_backward(how: str) -> None:
    drop = lambda t: F.dropout(t, 0.5)
    x = torch.ones(3, 40, device="jax", requires_grad=True)
    calls = {
        "torch_view": torch_view(jax_view(drop)),
        "jax_vmap": jax_vmap(drop),
        "j2t_autograd": j2t_autograd(jax_view(drop)),
        "compiled": torchax.compile(jax_vmap(drop)),
    }
    seen = []
    for _ in range(3):
        x.grad = None
        out = calls[how](x)
        drop(x)  # other numbers, in between
        out.sum().backward()
        torch.testing.assert_close(out.detach(), x.grad)
        seen.append(str(out.tolist()))
    assert len(set(seen)) == 3
