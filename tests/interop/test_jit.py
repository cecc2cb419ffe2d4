"""`jax_jit`, `JittableModule`, `extract_jax`, `extract_all_buffers`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax.interop import JittableModule, extract_all_buffers, extract_jax, jax_jit


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).to("jax")


def test_functional_call() -> None:
    model = net().eval()
    x = torch.randn(3, 4, device="jax")
    fn = jax_jit(lambda state, args: torch.func.functional_call(model, state, args))
    torch.testing.assert_close(fn(model.state_dict(), (x,)), model(x).detach())
    doubled = model.state_dict()
    doubled.update({k: v * 2 for k, v in doubled.items()})
    torch.testing.assert_close(fn(doubled, (x,)), torch.func.functional_call(model, doubled, (x,)))
    assert fn.cache_info().misses == 1


def test_state_is_not_lost() -> None:
    model, twin = net(), net()
    fn = jax_jit(lambda x: model(x))
    x = torch.randn(5, 4, device="jax")
    for _ in range(3):
        torch.testing.assert_close(fn(x), twin(x))
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)
    assert model[1].num_batches_tracked.item() == 3


def test_options_of_jax_jit(jax_devices: Any) -> None:
    fn = jax_jit(
        lambda x, n, *, flip=False: -x * n if flip else x * n, {"static_argnums": (1,), "static_argnames": ("flip",)}
    )
    x = torch.ones(2, device="jax")
    assert fn(x, 3, flip=True).tolist() == [-3, -3]

    donating = jax_jit(lambda x, y: (x + 1, y * 2), {"donate_argnums": (0,)})
    y = torch.ones(2, device="jax")
    out, _ = donating(x, y)
    assert out.tolist() == [2, 2] and y.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="donated"):
        x.tolist()

    mesh = jax.sharding.Mesh(np.array(jax_devices[:2]), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded = jax_jit(
        lambda s, x: {"a": x * s["k"], "b": x.sum()},
        in_shardings=(whole, split),
        out_shardings={"a": split, "b": whole},
    )
    out = sharded({"k": torch.tensor(3.0, device="jax")}, torch.ones(4, 2, device="jax"))
    assert out["a"].jax().sharding.is_equivalent_to(split, 2) and out["b"].item() == 8
    with pytest.raises(TypeError, match="unknown option"):
        jax_jit(lambda x: x, {"statics": 1})

    @jax_jit(kwargs_for_jax_jit={"static_argnums": 1})
    def power(x: torch.Tensor, n: int) -> torch.Tensor:
        return x**n

    assert power(torch.full((1,), 2.0, device="jax"), 3).item() == 8


def test_jittable_module() -> None:
    model = net()
    jitted, twin = JittableModule(model), net()
    x, y = torch.randn(6, 4, device="jax"), torch.randint(0, 2, (6,), device="jax")
    for _ in range(2):
        F.cross_entropy(jitted(x), y).backward()
        F.cross_entropy(twin(x), y).backward()
    for p, q in zip(jitted.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jitted.buffers["1.running_mean"], twin[1].running_mean)
    assert model[1].num_batches_tracked.item() == 2
    jitted.eval()
    twin.eval()
    torch.testing.assert_close(jitted(x), twin(x))
    assert jitted.params.keys() == dict(model.named_parameters()).keys()
    assert jitted.state_dict().keys() == model.state_dict().keys()


def test_jittable_module_with_other_state_and_methods() -> None:
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

        def score(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            return self(x).sigmoid() * scale

    model = Scorer().to("jax")
    jitted = JittableModule(model)
    x = torch.randn(2, 3, device="jax")
    torch.testing.assert_close(jitted.jittable_call("score", x, scale=2.0), model.score(x, scale=2.0))
    other = {k: torch.zeros_like(v) for k, v in jitted.params.items()}
    assert jitted.functional_call("score", other, jitted.buffers, x).tolist() == [[0.5], [0.5]]
    assert jitted.functional_call(lambda m, a: m.linear.bias + a, other, {}, 1).tolist() == [1]
    jitted.params = other
    assert jitted(x).tolist() == [[0], [0]]
    assert model.linear.weight.abs().sum().item() > 0


def test_extract_all_buffers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("hidden", torch.ones(1), persistent=False)
            self.table = torch.arange(3)

    params, buffers = extract_all_buffers(Net())
    assert set(params) == {"linear.weight", "linear.bias"} and set(buffers) == {"hidden", "table"}


def test_extract_jax_trains_with_optax() -> None:
    model = net().eval()
    states, fn = extract_jax(model)
    x = jnp.ones((4, 4))
    np.testing.assert_allclose(fn(states, (x,)), model(torchax.Tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-6)
    loss = jax.jit(lambda s: jnp.mean(fn(s, (x,)) ** 2))
    weights = {k: v for k, v in states.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    rest = {k: v for k, v in states.items() if k not in weights}
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(weights)
    first = float(loss(states))
    for _ in range(5):
        grads = jax.grad(lambda w: loss({**w, **rest}))(weights)
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        weights = optax.apply_updates(weights, updates)
    assert float(loss({**weights, **rest})) < first
    assert set(states) == set(model.state_dict())


def test_extract_jax_of_a_cpu_module_and_keywords() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * scale

    model = Net()
    states, fn = extract_jax(model)
    got = jax.jit(fn)(states, (jnp.ones((1, 2)),), {"scale": jnp.float32(2)})
    np.testing.assert_allclose(got, model(torch.ones(1, 2), scale=torch.tensor(2.0)).detach(), rtol=1e-6)
    assert model.linear.weight.device.type == "cpu"


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(i))

    model = Tied().to("jax")
    i = torch.tensor([0, 3], device="jax")
    model(i).square().sum().backward()
    states, fn = extract_jax(model)
    assert list(states) == ["embed.weight"]
    grads = jax.grad(lambda s: jnp.sum(fn(s, (i.jax(),)) ** 2))(states)
    np.testing.assert_allclose(grads["embed.weight"], model.embed.weight.grad.numpy(), rtol=1e-5)
