"""Values and functions of one world as seen from the other, in every kind of container."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax.interop import call_jax, call_torch, extract_jax, jax_view, jax_vmap, shard_map, torch_view


class Pair(NamedTuple):
    a: Any
    b: Any


@jax.tree_util.register_pytree_node_class
class Box:
    """A node that only JAX knows."""

    def __init__(self, value: Any, label: str = "box"):
        self.value, self.label = value, label

    def tree_flatten(self) -> Any:
        return (self.value,), self.label

    @classmethod
    def tree_unflatten(cls, label: Any, children: Any) -> Box:
        return cls(*children, label)


def model_output(x: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=x, hidden_states=(x, x))


def cache(x: Any) -> Any:
    from transformers import DynamicCache

    made = DynamicCache()
    made.update(x[None, None], x[None, None], 0)
    return made


CONTAINERS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 1, None),
    "list": lambda x: [x, "text", (x, 2.5)],
    "dict": lambda x: {"a": x, 3: [x]},
    "namedtuple": lambda x: Pair(x, {"k": x}),
    "OrderedDict": lambda x: collections.OrderedDict(a=x, b=x),
    "defaultdict": lambda x: collections.defaultdict(list, a=x),
    "deque": lambda x: collections.deque([x, x]),
    "return_types": lambda x: torch.return_types.max((x, x)),
    "Box": lambda x: Box(x),
    "ModelOutput": model_output,
    "cache": cache,
}


def tensors_of(x: Any) -> list[torch.Tensor]:
    """All tensors in what the table makes."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, Box):
        return tensors_of(x.value)
    if hasattr(x, "layers"):
        return [t for layer in x.layers for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor)]
    if isinstance(x, dict):
        return [t for v in x.values() for t in tensors_of(v)]
    return [t for v in x for t in tensors_of(v)] if isinstance(x, (list, tuple, collections.deque)) else []


@pytest.mark.parametrize("kind", CONTAINERS)
def test_there_and_back(kind: str) -> None:
    x = torch.randn(2, 3, device="jax")
    nest = CONTAINERS[kind](x)
    there = jax_view(nest)
    back = torch_view(there)
    assert type(back) is type(nest) or kind == "tensor"
    assert not tensors_of(there)
    assert len(tensors_of(back)) == len(tensors_of(nest)) > 0
    for t, original in zip(tensors_of(back), tensors_of(nest), strict=True):
        assert type(t) is torchax.Tensor
        torch.testing.assert_close(t, original)


@pytest.mark.parametrize("compiled", [False, True], ids=["jax_view", "compile"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_through_a_function(kind: str, compiled: bool) -> None:
    def double(nest: Any, factor: int) -> tuple[Any, Any]:
        found = tensors_of(nest)
        assert all(type(t) is torchax.Tensor for t in found)
        return nest, CONTAINERS[kind](found[0].reshape(2, 3) * factor)

    x = torch.randn(2, 3, device="jax")
    nest = CONTAINERS[kind](x)
    if compiled:
        same, doubled = torchax.compile(double)(nest, 2)
    else:
        same, doubled = torch_view(jax_view(double)(jax_view(nest), 2))
    assert type(doubled) is type(nest)
    for t, original in zip(tensors_of(doubled), tensors_of(nest), strict=True):
        torch.testing.assert_close(t, original * 2)
    for t, original in zip(tensors_of(same), tensors_of(nest), strict=True):
        torch.testing.assert_close(t, original)


def test_optax_states() -> None:
    state = optax.adam(1e-3).init({"w": jnp.ones(3)})
    seen = torch_view(state)
    assert type(seen[0]) is type(state[0])
    assert type(seen[0].mu["w"]) is torchax.Tensor
    assert jax.tree.structure(jax_view(seen)) == jax.tree.structure(state)


def test_plain_values() -> None:
    assert jax_view(torch.bfloat16) == jnp.bfloat16 and torch_view(np.dtype(np.int64)) is torch.int64
    assert jax_view(3) == 3 and torch_view("x") == "x" and jax_view(None) is None
    array = jnp.ones(3)
    assert torch_view(array).jax() is array and jax_view(torch_view(array)) is array
    assert isinstance(jax_view(torch.ones(2)), jax.Array)
    key = jax.random.key(0)
    assert torch_view(key) is key


def test_call_jax_and_call_torch(pair: Any, assert_same: Any) -> None:
    cpu, x = pair(3, 4)
    assert_same(call_jax(jnp.sin, x), torch.sin(cpu))
    assert_same(call_jax(lambda a, *, scale: {"out": a * scale}, x, scale=2), {"out": cpu * 2})
    np.testing.assert_allclose(call_torch(F.softmax, x.jax(), dim=-1), F.softmax(cpu, -1).numpy(), rtol=1e-6)


def test_int64_stays_int64() -> None:
    x = torch.tensor([2**40, 1], device="jax")
    assert call_jax(lambda a: a + 1, x).tolist() == [2**40 + 1, 2]
    out = jax.jit(jax_view(lambda t: t.argmax() + 2**40))(jnp.array([1.0, 3.0]))
    assert out.dtype == jnp.int64 and int(out) == 2**40 + 1


def test_under_jax_transformations() -> None:
    torch.manual_seed(0)
    cpu = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    want = cpu(x).detach().numpy()
    states, fn = extract_jax(cpu)
    np.testing.assert_allclose(jax.jit(fn)(states, (jnp.asarray(x.numpy()),)), want, rtol=1e-5, atol=1e-6)
    forward = jax_view(cpu.to("jax"))
    array = jnp.asarray(x.numpy())
    np.testing.assert_allclose(jax.jit(forward)(array), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(forward)(array), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(forward))(array), want, rtol=1e-5, atol=1e-6)
    jacobian = jax.jacfwd(forward)(array[0])
    np.testing.assert_allclose(jacobian, jax.jacrev(forward)(array[0]), rtol=1e-5, atol=1e-6)


def test_detach_stops_gradients_of_jax() -> None:
    straight_through = jax_view(lambda x: (x + (x.round() - x).detach()).sum())
    np.testing.assert_array_equal(jax.grad(straight_through)(jnp.array([0.3, 0.7])), [1.0, 1.0])
    half = jax_view(lambda x: (x[1:].detach() * x[1:]).sum())
    np.testing.assert_array_equal(jax.jit(jax.grad(half))(jnp.arange(3.0)), [0.0, 1.0, 2.0])


def test_factories_without_a_device_make_jax_tensors() -> None:
    def rows(x: torch.Tensor) -> torch.Tensor:
        return x[torch.arange(2)] + torch.tensor([1.0, 2.0, 3.0]) * torch.ones(())

    x = jnp.zeros((4, 3))
    for fn in (jax_view(rows), jax.jit(jax_view(rows))):
        np.testing.assert_array_equal(fn(x), [[1, 2, 3], [1, 2, 3]])
    assert torchax.compile(rows)(torch.zeros(4, 3, device="jax")).tolist() == [[1, 2, 3], [1, 2, 3]]
    assert torch.ones(2).device.type == "cpu"


def test_vmap_and_shard_map(jax_devices: Any) -> None:
    batched = jax_vmap(lambda a, b: a @ b)
    a, b = torch.randn(4, 2, 3, device="jax"), torch.randn(4, 3, 2, device="jax")
    torch.testing.assert_close(batched(a, b), a @ b)
    mesh = jax.sharding.Mesh(np.array(jax_devices[:2]), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    seen: list[Any] = []

    def part(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return x * 2

    x = torch.randn(4, 3, device="jax")
    torch.testing.assert_close(shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec)(x).cpu(), (x * 2).cpu())
    assert set(seen) == {2}


def test_random_numbers_in_a_jax_function() -> None:
    drop = jax_view(lambda x: F.dropout(x, 0.5))
    x = jnp.ones(64)
    assert not np.array_equal(drop(x), drop(x))
    with pytest.warns(UserWarning, match="random numbers are drawn in a function that JAX traces"):
        jitted = jax.jit(drop)
        jitted(x)
    assert torch.rand(2, device="jax").device.type == "jax"  # the state outside is no tracer


def test_writes_in_a_jax_function_are_reported() -> None:
    norm = nn.BatchNorm1d(3).to("jax")
    before = norm.running_mean.clone()
    with pytest.warns(UserWarning, match="wrote 3 tensor"):
        jax.jit(jax_view(norm))(jnp.ones((4, 3)))
    torch.testing.assert_close(norm.running_mean, before)


@dataclasses.dataclass
class Opaque:
    """No container."""

    number: int


def test_objects_pass_through() -> None:
    thing = Opaque(3)
    assert jax_view(lambda x, o: x * o.number)(jnp.ones(2), thing).tolist() == [3, 3]
    assert torchax.compile(lambda x, o: (x, o))(torch.ones(2, device="jax"), thing)[1] is thing
