"""Attention kernels in programs that are divided over devices, interpreted on virtual ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("torchax_ops_pallas")
from torchax_ops_pallas import dividing
from torchax_ops_pallas.attention import attention


def _value_and_gradients(query, key, value, *mask):
    def loss(*qkv):
        out = attention(*qkv, *mask, causal=True, scale=0.2, interpret=True)
        return jnp.square(out).sum(), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


def _case(batch, heads, key_heads, mask):
    rng = np.random.default_rng(heads)
    draw = lambda heads: jnp.asarray(rng.standard_normal((batch, heads, 70, 64)), jnp.float32)
    return (
        draw(heads),
        draw(key_heads),
        draw(key_heads),
        *(() if mask is None else (jnp.asarray(rng.random(mask) > 0.3),)),
    )


@pytest.mark.parametrize(
    ("mesh", "heads", "key_heads", "mask", "divided"),
    [
        ((2, 2), 4, 2, None, P("data", "model")),
        ((2, 2), 4, 2, (70, 70), P("data", "model")),
        ((2, 2), 2, 1, (4, 1, 1, 70), P("data", "model")),  # key heads are whole on each device
        ((1, 4), 4, 2, None, P("data", "model")),  # more devices than key heads: each finds its own
        ((2, 2), 3, 3, None, P("data")),  # heads that cannot be divided
    ],
)
def test_divided_operands_give_what_whole_ones_give(mesh, heads, key_heads, mask, divided, virtual_mesh):
    operands = _case(4, heads, key_heads, mask)
    mesh = virtual_mesh(mesh)
    of_keys = divided if key_heads % mesh.shape["model"] == 0 else P("data")
    specs = [divided, of_keys, of_keys, *(P("data") if m.shape[0] == 4 else P() for m in operands[3:])]
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, specs, strict=True)]
    program = jax.jit(_value_and_gradients).lower(*placed).compile()
    for found, expected in zip(program(*placed), _value_and_gradients(*operands), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    text = program.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert found.sharding.shard_shape(found.shape)[0] == 4 // mesh.shape["data"]


def test_operands_laid_out_otherwise_are_laid_out_anew(virtual_mesh):
    operands = _case(3, 2, 2, None)
    mesh = virtual_mesh((2,), ("x",))
    placed = [jax.device_put(x, NamedSharding(mesh, P(None, None, "x"))) for x in operands]
    for found, expected in zip(jax.jit(_value_and_gradients)(*placed), _value_and_gradients(*operands), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [None, (70, 70), (2, 1, 1, 70)])
def test_vmap_folds_into_the_batch(mask):
    cases = [_case(2, heads, 2, mask)[:1] + _case(2, 2, 2, mask)[1:] for heads in (2, 2, 2)]
    queries = jnp.stack([c[0] * (i + 1) for i, c in enumerate(cases)])
    rest = cases[0][1:]
    masks = () if mask is None else (jnp.stack([rest[2], ~rest[2], rest[2]]),)
    found = jax.vmap(_value_and_gradients, in_axes=(0, None, None, *(0 for _ in masks)))(queries, *rest[:2], *masks)
    for i in range(3):
        one = _value_and_gradients(queries[i], *rest[:2], *(m[i] for m in masks))
        for a, b in zip(found, one, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("manual", [{"data", "model"}, {"data"}])
def test_inside_of_shard_map(manual, virtual_mesh):
    operands = _case(4, 4, 2, None)
    mesh = virtual_mesh((2, 2))
    spec = P("data", "model") if len(manual) == 2 else P("data")
    each = jax.shard_map(
        _value_and_gradients, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=manual, check_vma=False
    )
    for found, expected in zip(jax.jit(each)(*operands), _value_and_gradients(*operands), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def _shape(names, sizes):
    return jax.sharding.AbstractMesh(sizes, names)


@pytest.mark.parametrize(
    ("mesh", "known", "sizes", "expected"),
    [
        (_shape(("data", "model"), (2, 4)), None, (4, 8, 4), (("data",), ("model",), ("model",))),
        (_shape(("data", "model"), (2, 4)), None, (4, 8, 2), (("data",), ("model",), ())),
        (_shape(("data", "model"), (2, 4)), None, (3, 6, 6), ((), ("data",), ("data",))),
        (_shape(("data", "model"), (2, 4)), ("data", "model"), (8, 8, 8), (("data", "model"), (), ())),
        (_shape(("model",), (4,)), (), (4, 8, 8), ((), ("model",), ("model",))),
        (_shape(("model",), (4,)), None, (4, 8, 8), (("model",), (), ())),
        (_shape(("a", "b", "c"), (2, 2, 2)), None, (4, 2, 1), (("a", "b"), ("c",), ())),
        (_shape(("x",), (2,)), None, (1, 3, 3), ((), (), ())),
    ],
)
def test_which_axes_divide_what(mesh, known, sizes, expected):
    if known is not None:
        torchax._sharding.divide_batch(mesh, known)
    axes = dividing.divide(mesh, *sizes)
    assert (axes["b"], axes["h"], axes["g"]) == expected


def test_a_model_that_is_divided(virtual_mesh):
    from torchax.interop import shard_batch, shard_module, tensor_parallel

    mesh = virtual_mesh((2, 2))

    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(64, 128) for _ in range(3))
            self.o_proj = torch.nn.Linear(128, 64)

        def forward(self, x):
            q, k, v = (p(x).unflatten(-1, (2, 64)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o_proj(out.transpose(1, 2).flatten(2))

    model, x = Attend(), torch.randn(2, 64, 64)
    expected = model(x)
    expected.square().sum().backward()
    gradient = model.q_proj.weight.grad
    model.zero_grad()
    with torchax.config.override(pallas="interpret"):
        model = shard_module(model.to("jax"), mesh, tensor_parallel("model"))
        found = torchax.compile(model)(shard_batch(x, mesh))
        found.square().sum().backward()
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.q_proj.weight.grad.cpu(), gradient, rtol=1e-3, atol=1e-3)
    assert torchax._sharding.batch_axes(("data", "model")) == ("data",)
