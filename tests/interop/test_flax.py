"""flax and equinox modules in torch models, torch modules in flax and equinox models; gradients both ways."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn as nn
import torchax
from torchax.interop import JaxModule, extract_jax

pytest.importorskip("flax")
import equinox as eqx
import torchax.flax
from flax import linen, nnx
from torchax.flax import FlaxNNModule, NNXModule, TorchLinen, TorchNNX


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        return linen.Dense(2)(linen.Dropout(0.5, deterministic=not train)(jnp.tanh(x)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs: Any):
        self.first, self.norm = nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.drop(jnp.tanh(self.norm(self.first(x)))))


def torch_mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))


def data() -> tuple[torch.Tensor, jax.Array]:
    x = torch.randn(5, 3, device="jax")
    return x, x.jax()


# ---------------------------------------------------------------------- flax in torch
def test_linen_in_torch() -> None:
    x, a = data()
    module = FlaxNNModule(torchax.default_env(), Mlp(), (x,), {"train": True})  # as existing users call it
    assert "params.Dense_0.kernel" in module.state_dict() and len(list(module.parameters())) == 6
    module.eval()
    params = jax.tree.map(lambda t: t.detach().jax(), module.params())
    stats = jax.tree.map(lambda t: t.jax(), module.collections["batch_stats"]())

    def apply(p: Any) -> Any:
        return Mlp().apply({"params": p, "batch_stats": stats}, a, train=False)

    out = module(x, train=False)
    np.testing.assert_allclose(out.detach().jax(), apply(params), rtol=1e-6)
    out.square().sum().backward()
    want = jax.grad(lambda p: jnp.sum(apply(p) ** 2))(params)
    for got, g in zip(module.params.tensors(), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got.grad.jax(), g, rtol=1e-5, atol=1e-6)
    module.train()
    before = module.collections["batch_stats"].tensors()[0].clone()
    assert not torch.equal(module(x), module(x))  # dropout draws anew
    assert not torch.equal(module.collections["batch_stats"].tensors()[0], before)
    twin = FlaxNNModule(Mlp(), (x,))
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin.eval()(x, train=False), module.eval()(x, train=False))
    with pytest.raises(TypeError, match="takes a flax.linen.Module and a tuple of sample arguments"):
        FlaxNNModule(nn.Linear(2, 2), (x,))


def test_nnx_in_torch() -> None:
    x, a = data()
    original = NnxMlp(nnx.Rngs(0))
    module = NNXModule(original)
    assert {"params.first.kernel", "rest.norm.mean", "rest.drop.rngs.count"} <= set(module.state_dict())
    module.eval()
    original.eval()
    np.testing.assert_allclose(module(x).detach().jax(), original(a), rtol=1e-6)
    module(x).square().sum().backward()
    want = nnx.grad(lambda m: jnp.sum(m(a) ** 2))(original)
    for got, g in zip(module.params.tensors(), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got.grad.jax(), g, rtol=1e-5, atol=1e-6)
    module.train()
    before = module.rest.norm.mean.clone()
    assert not torch.equal(module(x), module(x)) and not torch.equal(module.rest.norm.mean, before)
    np.testing.assert_array_equal(original.norm.mean[...], jnp.zeros(8))  # was copied
    with pytest.raises(TypeError, match=r"NNXModule takes a flax\.nnx\.Module"):
        NNXModule(Mlp())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox"])
def test_trained_by_torch_in_one_program(kind: str) -> None:
    x, _ = data()
    if kind == "equinox":
        weights, rest = eqx.partition(eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0)), eqx.is_array)
        inner: nn.Module = JaxModule(lambda w, x: jax.vmap(eqx.combine(w, rest))(x), weights)
        assert "params.layers.0.weight" in inner.state_dict()
    else:
        inner = FlaxNNModule(Mlp(), (x,)) if kind == "linen" else NNXModule(NnxMlp(nnx.Rngs(0)))
    model = nn.Sequential(nn.Linear(3, 3).to("jax"), inner)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    @torchax.compile
    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [step().item() for _ in range(25)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) and step.cache_info().misses <= 2
    assert model[0].weight.grad.abs().sum().item() > 0


def test_second_derivatives_of_a_jax_module() -> None:
    module = JaxModule(lambda p, x: jnp.sum(p["type"] * x**3), {"type": jnp.arange(3.0)})
    assert list(module.state_dict()) == ["params.type_"]  # torch.nn.Module has a method of that name
    x = torch.ones(3, device="jax", requires_grad=True)
    (g,) = torch.autograd.grad(module(x), x, create_graph=True)
    g.sum().backward()
    assert x.grad.tolist() == [0, 6, 12] and module.params().pop("type").grad.tolist() == [3, 3, 3]


# ---------------------------------------------------------------------- torch in flax and equinox
def test_torch_in_linen() -> None:
    _, a = data()
    net = torch_mlp()

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(1)(TorchLinen(net, name="torch")(x))

    model = Model()
    variables = model.init(jax.random.key(0), a)
    assert set(variables["params"]["torch"]) == {n for n, _ in net.named_parameters()}

    def loss(params: Any) -> Any:
        out, after = model.apply({**variables, "params": params}, a, mutable=["batch_stats"])
        return jnp.sum(out**2), after

    grads, after = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    twin = torch_mlp()
    dense = variables["params"]["Dense_0"]
    out = twin(torch.from_numpy(np.array(a))) @ torch.from_numpy(np.array(dense["kernel"]))
    out.square().sum().backward()
    for name, p in twin.named_parameters():
        np.testing.assert_allclose(grads["torch"][name], p.grad, rtol=1e-4, atol=1e-5)
    for name, b in twin.named_buffers():
        np.testing.assert_allclose(after["batch_stats"]["torch"][name], b, rtol=1e-5)
    assert net[1].num_batches_tracked.item() == 0
    evaluating = TorchLinen(net, train=False)
    evaluated = evaluating.apply(evaluating.init(jax.random.key(0), a), a)
    np.testing.assert_allclose(evaluated, net.eval()(torch.from_numpy(np.array(a))).detach(), rtol=1e-5, atol=1e-6)


def test_random_numbers_of_torch_in_linen() -> None:
    _, a = data()
    layer = TorchLinen(nn.Dropout(0.5))
    draw = jax.jit(lambda key: layer.apply({}, a, rngs={"dropout": key}))
    one, same, other = (draw(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_torch_in_nnx() -> None:
    _, a = data()

    class Model(nnx.Module):
        def __init__(self, rngs: Any):
            self.torch, self.last = TorchNNX(torch_mlp(0.5), rngs=rngs), nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(self.torch(x))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(a) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(25)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) and losses[0] != losses[1]
    assert int(model.torch.buffers["1.num_batches_tracked"][...]) == 25
    model.eval()
    np.testing.assert_array_equal(model(a), model(a))


def test_torch_in_equinox() -> None:
    _, a = data()
    net = torch_mlp().eval()

    class Model(eqx.Module):
        weights: dict[str, jax.Array]
        last: eqx.nn.Linear
        apply: Any = eqx.field(static=True)

        def __init__(self) -> None:
            self.weights, self.apply = extract_jax(net)
            self.last = eqx.nn.Linear(2, 1, key=jax.random.key(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.last(self.apply(self.weights, (x[None],))[0])

    model = Model()
    value, grads = eqx.filter_value_and_grad(lambda m: jnp.sum(jax.vmap(m)(a) ** 2))(model)
    out = net(torch.from_numpy(np.array(a))) @ torch.from_numpy(np.array(model.last.weight)).T + torch.from_numpy(
        np.array(model.last.bias)
    )
    out.square().sum().backward()
    np.testing.assert_allclose(value, out.square().sum().item(), rtol=1e-5)
    for name, p in net.named_parameters():
        np.testing.assert_allclose(grads.weights[name], p.grad, rtol=1e-4, atol=1e-5)


def test_names() -> None:
    assert set(torchax.flax.__all__) <= set(dir(torchax.flax))
    with pytest.raises(AttributeError, match=r"torchax\.flax' has no attribute 'Nothing'"):
        _ = torchax.flax.Nothing
