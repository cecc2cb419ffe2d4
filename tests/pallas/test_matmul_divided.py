"""Products of groups in programs that are divided over devices: on virtual ones, and by the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_programs import devices

pytest.importorskip("torchax_ops_pallas")
from torchax_ops_pallas.grouped import grouped_matmul, grouped_outer


def _train(interpret):
    def step(x, matrices, grad, ends):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, ends, interpret), x, matrices)
        return out, *pull(grad)

    return step


@pytest.mark.parametrize(
    ("mesh", "sizes", "specs"),
    [
        ((2, 2), [10, 0, 17, 9], (P("data"), P("model"), P("data"))),  # rows and groups
        ((1, 4), [10, 0, 17, 9], (P(), P("model"), P())),  # groups
        ((4, 1), [0, 0, 30, 2], (P("data"), P(), P("data"))),  # rows, of which the last ones are of no group
        ((2, 2), [10, 20, 6], (P("data"), P(None, None, "model"), P("data", "model"))),  # rows and columns
    ],
)
def test_divided_operands_give_what_whole_ones_give(mesh, sizes, specs, virtual_mesh):
    rng = np.random.default_rng(len(sizes))
    mesh, draw = virtual_mesh(mesh), lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    operands = draw(40, 16), draw(len(sizes), 16, 24), draw(40, 24), jnp.asarray(np.cumsum(sizes), jnp.int32)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, (*specs, P()), strict=True)]
    step = _train(True)
    program = jax.jit(lambda *t: step(*t)).lower(*placed).compile()
    found = program(*placed)
    for x, expected in zip(found, step(*operands), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)
    text = program.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    for x, spec in zip(found, (specs[2], specs[0], specs[1]), strict=True):
        assert x.sharding.shard_shape(x.shape) == NamedSharding(mesh, spec).shard_shape(x.shape)


def test_gradients_of_gradients(virtual_mesh):
    mesh = virtual_mesh((2, 2))
    rng = np.random.default_rng(0)
    x, y, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((40, 16), (40, 24), (4, 16, 24)))
    ends = jnp.asarray([10, 10, 27, 36], jnp.int32)

    def twice(x, y, w):
        inner = jax.grad(lambda x, w: jnp.sin(grouped_matmul(x, w, ends, True) * y).sum(), argnums=(0, 1))
        return jax.grad(lambda *t: sum(jnp.square(g).sum() for g in inner(*t)), argnums=(0, 1))(x, w)

    placed = [
        jax.device_put(t, NamedSharding(mesh, P(a))) for t, a in zip((x, y, w), ("data", "data", "model"), strict=True)
    ]
    for found, expected in zip(jax.jit(twice)(*placed), twice(x, y, w), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_vmap_calls_one_after_another():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 12, 8), (12, 8)))
    ends = jnp.asarray([5, 12], jnp.int32)
    found = jax.vmap(lambda x: grouped_outer(x, y, ends, True))(x)
    for each, part in zip(found, x, strict=True):
        np.testing.assert_allclose(each, grouped_outer(part, y, ends, True), rtol=1e-5, atol=1e-5)


def test_experts_of_a_divided_model(virtual_mesh):
    from torchax.interop import by_name, shard_batch, shard_module

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (torch.nn.Parameter(torch.randn(4, *s) / 4) for s in ((16, 32), (32, 16)))

        def forward(self, x, expert):
            order = expert.argsort(stable=True)
            offs = (expert[:, None] == torch.arange(4, device=x.device)).sum(0).cumsum(0).int()
            hidden = torch.nn.functional.grouped_mm(x[order], self.up, offs=offs).relu()
            return torch.nn.functional.grouped_mm(hidden, self.down, offs=offs)[order.argsort()]

    model, x, expert = Experts(), torch.randn(24, 16), torch.randint(0, 4, (24,))
    expected = model(x, expert)
    expected.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    mesh = virtual_mesh((2, 2))
    with torchax.config.override(pallas="interpret"):
        model = shard_module(model.to("jax"), mesh, by_name([("*", ("model", None, None))], batch="data"))
        found = torchax.compile(model)(shard_batch(x, mesh), shard_batch(expert, mesh))
        found.square().sum().backward()
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-4, atol=1e-4)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad.cpu(), gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.tpu_aot
def test_the_tpu_compiler_gathers_no_matrices():
    mesh = Mesh(devices().reshape(2, 2), ("data", "model"))
    rows, k, n, groups = 8192, 1024, 512, 8
    shapes = ((rows, k), P("data")), ((groups, k, n), P("model")), ((rows, n), P("data"))
    avals = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, p)) for s, p in shapes]
    avals.append(jax.ShapeDtypeStruct((groups,), jnp.int32, sharding=NamedSharding(mesh, P())))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(_train(False)).trace(*avals).lower(lowering_platforms=("tpu",)).compile()
    text = program.as_text()
    assert text.count("tpu_custom_call") >= 3
    assert "all-gather" not in text and "all-to-all" not in text
