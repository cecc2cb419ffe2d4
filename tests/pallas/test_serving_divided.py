"""Attention over pages in programs that are divided over devices: on virtual ones, and by the TPU compiler."""

from __future__ import annotations

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torchax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torchax import convert

from tpu_programs import devices

pytest.importorskip("torchax_ops_pallas")
from jax._src import literals
from jax.experimental.pallas import tpu as pltpu
from torchax_ops_pallas import dividing, paged, ragged

_DIVIDED = [P(None, "model"), P(None, None, "model"), P(), P(), P(), P()]


def _random(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.bfloat16)


def _paged(sequences=4, heads=4, key_heads=2, pages=9, size=8, of_each=3):
    cache = _random(key_heads, pages, size, 128)
    lengths = jnp.asarray(np.arange(sequences) * 5 % (of_each * size), jnp.int32)
    indices = jnp.asarray(np.arange(sequences * of_each).reshape(sequences, of_each) * 7 % pages, jnp.int32)
    return _random(sequences, heads, 128), cache, cache[:, ::-1], lengths, indices


def _ragged(tokens=24, heads=4, key_heads=2, pages=9, size=8, of_each=3):
    indices = jnp.asarray(np.arange(3 * of_each).reshape(3, of_each), jnp.int32)
    integers = ([9, 20, 3], indices, [0, 4, 20, 23], [3])
    operands = _random(tokens, heads, 128), _random(pages, size, 2 * key_heads, 128)
    return *operands, *(jnp.asarray(x, jnp.int32) for x in integers)


def _paged_call(*operands):
    return paged.paged_attention_kernel(*operands, 0.1)


def _ragged_call(*operands):
    return ragged.ragged_paged_attention_kernel(*operands, 0.1, 7)


@pytest.fixture
def interpreted(monkeypatch):
    """JAX's rule for stores asks positions for their shape, and positions that are numbers have none."""
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    with torchax.config.override(pallas="interpret"), pltpu.force_tpu_interpret_mode(True):
        yield


def _check(call, operands, mesh, specs):
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, specs, strict=True)]
    program = jax.jit(lambda *t: call(*t)).lower(*placed).compile()
    found = program(*placed)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(call(*operands), np.float32), rtol=2e-2, atol=2e-2
    )
    return program.as_text(), found.sharding.shard_shape(found.shape)


@pytest.mark.parametrize(
    ("mesh", "heads", "specs", "part"),
    [
        ((2, 2), (4, 2), [P("data", "model"), P("model"), P("model"), P("data"), P("data")], (2, 2, 128)),
        ((1, 4), (4, 2), [P()] * 5, (4, 4, 128)),  # key heads of a cache that cannot be divided are whole
        ((2, 2), (4, 1), [P("data"), P(), P(), P("data"), P("data")], (2, 4, 128)),
    ],
)
def test_paged_attention(interpreted, mesh, heads, specs, part, virtual_mesh):
    text, shape = _check(_paged_call, _paged(4, *heads), virtual_mesh(mesh), specs)
    assert shape == part and "all-gather" not in text and "all-to-all" not in text


def test_paged_attention_on_one_axis_divides_the_heads_of_the_cache(interpreted, virtual_mesh):
    specs = [P(None, "x"), P("x"), P("x"), P(), P()]
    text, shape = _check(_paged_call, _paged(4, 4, 4), virtual_mesh((4,), ("x",)), specs)
    assert shape == (4, 1, 128) and "all-gather" not in text and "all-to-all" not in text


def test_ragged_paged_attention(interpreted, virtual_mesh):
    text, shape = _check(_ragged_call, _ragged(), virtual_mesh((2, 2)), _DIVIDED)
    assert shape == (24, 2, 128) and "all-gather" not in text and "all-to-all" not in text


def test_vmap_calls_one_after_another(interpreted):
    query, *rest = _paged()
    queries = jnp.stack([query, query * 2])
    found = jax.vmap(lambda q: _paged_call(q, *rest))(queries)
    for q, out in zip(queries, found, strict=True):
        np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(_paged_call(q, *rest), np.float32))


@pytest.mark.parametrize(
    ("sizes", "batch", "heads", "expected"),
    [
        ((2, 4), 4, (8, 4), (("data",), ("model",))),
        ((2, 4), 4, (8, 2), (("data",), ())),  # a device would need half of a key head
        ((2, 2), 3, (48, 24), ((), ("model",))),  # an axis of the batch divides no cache
        ((2, 4), 4, (48, 24), (("data",), ())),  # 6 key heads do not fit the kernel
    ],
)
def test_which_axes_divide_what(sizes, batch, heads, expected):
    mesh = jax.sharding.AbstractMesh(sizes, ("data", "model"))
    axes = dividing.divide(mesh, batch, *heads, of_cache=lambda n: n != 6)
    assert (axes["b"], axes["h"]) == expected and axes["h"] == axes["g"] == axes["p"]


@pytest.mark.tpu_aot
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_the_tpu_compiler_gathers_no_cache(kind):
    mesh = Mesh(devices().reshape(2, 2), ("data", "model"))
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    if kind == "paged":
        cache = shape(jnp.bfloat16, 8, 1024, 16, 128)
        shapes = (shape(jnp.bfloat16, 8, 32, 128), cache, cache, shape(jnp.int32, 8), shape(jnp.int32, 8, 128))
        specs = [P("data", "model"), P("model"), P("model"), P("data"), P("data")]
    else:
        shapes = (
            shape(jnp.bfloat16, 256, 32, 128),
            shape(jnp.bfloat16, 1024, 16, 16, 128),
            shape(jnp.int32, 8),
            shape(jnp.int32, 8, 128),
            shape(jnp.int32, 9),
            shape(jnp.int32, 1),
        )
        specs = _DIVIDED
    avals = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, p))
        for s, p in zip(shapes, specs, strict=True)
    ]
    call = _paged_call if kind == "paged" else _ragged_call
    with contextlib.ExitStack() as stack:
        stack.enter_context(convert.compiling_for("tpu"))
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        out = NamedSharding(mesh, specs[0])
        program = jax.jit(call, out_shardings=out).trace(*avals).lower(lowering_platforms=("tpu",)).compile()
    text = program.as_text()
    assert text.count("tpu_custom_call") == 1
    collective = re.compile("all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute")
    assert not [line for line in text.splitlines() if collective.search(line)]
    assert program.memory_analysis().temp_size_in_bytes < 2**20
