"""Dropout in the attention kernels: which weights are dropped, and values and gradients against float64 with the same ones dropped."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchax
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from torchax import interop

from helpers import examples

pytest.importorskip("torchax_ops_pallas")
from torchax_ops_pallas import reference
from torchax_ops_pallas.attention import attention
from torchax_ops_pallas.blocks import Blocks
from torchax_ops_pallas.dropout import dense, head_keys, kept
from torchax_ops_pallas.masked import masked_attention

_SEED = np.array([123456789, -987654321], np.int32)


# ---------------------------------------------------------------------- the bits
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_weights_are_dropped_independently_of_each_other(p):
    """Rates and correlations within five standard deviations of what independent draws have."""
    shape = (2, 3, 256, 384)
    found = np.asarray(dense(jnp.asarray(_SEED), *shape, p), np.float64)
    again = np.asarray(dense(jnp.asarray(_SEED + np.int32(1)), *shape, p), np.float64)
    for axes in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in (1, 2, 3, 4)):
        rate, n = found.mean(axes), np.prod([shape[i] for i in axes])
        if n >= 128:
            assert np.abs(rate - (1 - p)).max() < 5.5 * np.sqrt(p * (1 - p) / n)
    scaled = (found - (1 - p)) / np.sqrt(p * (1 - p))
    pairs = [(scaled, (again - (1 - p)) / np.sqrt(p * (1 - p)))]
    for axis, shift in itertools.product(range(4), (1, 2, 64, 128)):
        if shift < shape[axis]:
            pairs.append((scaled, np.roll(scaled, shift, axis)))
    pairs.append((scaled[..., :256], scaled[..., :256].swapaxes(2, 3)))
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 * np.sqrt(2 / a.size)
    # no query drops what another one drops, as it would if bits hung on sums of two hashes alone
    first = scaled[0, 0]
    alike = first @ first.T / first.shape[1]
    assert np.abs(alike - np.diag(np.diag(alike))).max() < 8 / np.sqrt(first.shape[1])


def test_a_block_is_a_part_of_the_whole():
    keys = head_keys(jnp.asarray(_SEED), 2, 4)
    whole = dense(jnp.asarray(_SEED), 2, 4, 300, 200, 0.3)
    assert (kept(keys, 40, 100, 130, 70, 0.3) == whole[:, :, 40:170, 100:170]).all()
    assert (kept(keys[1, 2], 7, 3, 5, 9, 0.3) == whole[1, 2, 7:12, 3:12]).all()


# ---------------------------------------------------------------------- the kernels
def _case(batch, heads, key_heads, length, keys, features, mask, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    draw = rng.standard_normal
    arrays = [draw((batch, heads, length, features)), *(draw((batch, key_heads, keys, features)) for _ in range(2))]
    drawn = {
        "none": lambda: None,
        "bool": lambda: rng.random((length, keys)) > 0.3,
        "of keys": lambda: rng.random((batch, 1, 1, keys)) > 0.3,
        "added": lambda: draw((batch, heads, length, keys)),
    }[mask]()
    if mask == "bool":
        drawn[5] = False  # a query that sees nothing
    return arrays, drawn


def _compare(attend, arrays, mask, causal, p, tolerance=2e-5, dtype=jnp.float32):
    def values(function, dtype):
        out, pull = jax.vjp(function, *(jnp.asarray(a, dtype) for a in arrays))
        return [np.asarray(x, np.float64) for x in (out, *pull(out))]

    seed = jnp.asarray(_SEED)
    mask = None if mask is None else jnp.asarray(mask, None if mask.dtype == bool else jnp.float32)
    options = {"causal": causal, "scale": 0.2, "dropout": p}
    found = values(lambda *x: attend(*x, mask, seed=seed, **options), dtype)
    same = dense(seed, *arrays[0].shape[:3], arrays[1].shape[2], p)
    with jax.enable_x64(True):
        expected = values(lambda *x: reference.attention(*x, mask, kept=same, **options), jnp.float64)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@examples(4)
@given(
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    length=st.integers(64, 200),
    keys=st.integers(64, 200),
    features=st.sampled_from([32, 80]),
    mask=st.sampled_from(["none", "bool", "of keys", "added"]),
    causal=st.booleans(),
    p=st.sampled_from([0.05, 0.5, 0.9]),
)
def test_values_and_gradients_equal_the_reference(heads, length, keys, features, mask, causal, p):
    arrays, drawn = _case(2, *heads, length, keys, features, mask)
    _compare(lambda *x, **o: attention(*x, interpret=True, **o), arrays, drawn, causal, p)


@pytest.mark.parametrize("blocks", [Blocks(128, 128, 128, 128), Blocks(256, 128, 128, 256)])
def test_block_sizes_do_not_matter(blocks):
    arrays, drawn = _case(1, 2, 1, 300, 260, 32, "of keys")
    _compare(lambda *x, **o: masked_attention(*x, blocks=blocks, interpret=True, **o), arrays, drawn, True, 0.4)


def test_the_interpreter_sees_no_race_and_nothing_out_of_bounds():
    checks = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    arrays, drawn = _case(1, 2, 1, 130, 150, 64, "bool")
    _compare(lambda *x, **o: attention(*x, interpret=checks, **o), arrays, drawn, True, 0.3)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_a_learned_bias_has_a_gradient():
    (q, k, v), bias = _case(1, 2, 1, 70, 80, 32, "added")
    seed = jnp.asarray(_SEED)
    q, k, v, bias = (jnp.asarray(x, jnp.float32) for x in (q, k, v, bias))
    same = dense(seed, 1, 2, 70, 80, 0.3)
    options = {"causal": False, "scale": 0.2, "dropout": 0.3}
    found = jax.grad(lambda b: jnp.square(attention(q, k, v, b, seed=seed, interpret=True, **options)).sum())(bias)
    expected = jax.grad(lambda b: jnp.square(reference.attention(q, k, v, b, kept=same, **options)).sum())(bias)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- through torch
def _weights(p=0.3, heads=2, length=64, **options):
    """The weights after dropout of one call, times what each of `length` keys has: its own unit vector."""
    zeros = torch.zeros(2, heads, length, length, device="jax")
    return F.scaled_dot_product_attention(
        zeros, zeros, torch.eye(length, device="jax").expand_as(zeros), dropout_p=p, **options
    )


def test_another_mask_on_every_call_and_the_same_one_after_the_same_seed():
    compiled = torchax.compile(_weights)
    with torchax.config.override(pallas="interpret"):
        for call in (_weights, compiled):
            torch.manual_seed(3)
            first, second = call(), call()
            torch.manual_seed(3)
            assert torch.equal(first, call()) and torch.equal(second, call())
            assert 0.3 < ((first == 0) != (second == 0)).float().mean() < 0.55  # 2 * 0.3 * 0.7
            kept_ones = first[first != 0]
            torch.testing.assert_close(kept_ones, torch.full_like(kept_ones, 1 / 64 / 0.7))
        torch.manual_seed(3)
        eager = _weights()
        torch.manual_seed(3)
        assert torch.equal(eager, compiled())
        with torch.inference_mode():
            torch.manual_seed(3)
            assert torch.equal(eager, _weights())
        assert (_weights(0.0) == 1 / 64).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_through_torch(compiled):
    torch.manual_seed(0)
    tensors = [torch.randn(2, n, 80, 32) for n in (4, 2, 2)]

    def run(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.25, enable_gqa=True)

    ours = [t.to("jax").requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    with torchax.config.override(pallas="interpret"):
        torch.manual_seed(1)
        seed = torch.ops.torchax.attention_seed(ours[0])
        torch.manual_seed(1)
        out = (torchax.compile(run) if compiled else run)(*ours)
        out.square().sum().backward()
    same = torch.ops.torchax.kept_weights(seed, 2, 4, 80, 80, 0.25).cpu()
    q, k, v = exact[0], *(t.repeat_interleave(2, 1) for t in exact[1:])
    scores = (q @ k.mT * 32**-0.5).masked_fill(torch.ones(80, 80, dtype=torch.bool).triu(1), -torch.inf)
    expected = (scores.softmax(-1) * same / 0.75) @ v
    expected.square().sum().backward()
    torch.testing.assert_close(out.detach().cpu().double(), expected.detach(), rtol=1e-4, atol=1e-4)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad.cpu().double(), b.grad, rtol=1e-3, atol=1e-3)


def test_gradients_of_gradients_are_of_the_same_mask():
    q, k, v = (torch.randn(1, 2, 64, 16, device="jax", requires_grad=True) for _ in range(3))
    mask = torch.rand(64, 64, device="jax") > 0.2

    def gradient(create_graph):
        torch.manual_seed(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.4)
        return torch.autograd.grad(out.square().sum(), q, create_graph=create_graph)[0]

    with torchax.config.override(pallas="interpret"):
        once, twice = gradient(False), gradient(True)
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-4)
        assert torch.autograd.grad(twice.square().sum(), k)[0].isfinite().all()


# ---------------------------------------------------------------------- divided, and for TPU
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (4, 1)])
def test_devices_drop_what_one_would(heads, key_heads, virtual_mesh):
    mesh = virtual_mesh((2, 2))
    arrays = [jnp.asarray(a, jnp.float32) for a in _case(4, heads, key_heads, 70, 70, 32, "none")[0]]
    seed = jnp.asarray(_SEED)

    def run(seed, *qkv):
        attend = lambda *x: attention(*x, causal=True, scale=0.2, dropout=0.4, seed=seed, interpret=True)
        out, pull = jax.vjp(attend, *qkv)
        return out, *pull(out)

    specs = [P("data", "model"), *[P("data", "model" if key_heads > 1 else None)] * 2]
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    program = jax.jit(run).lower(jax.device_put(seed, NamedSharding(mesh, P())), *placed).compile()
    found = program(jax.device_put(seed, NamedSharding(mesh, P())), *placed)
    for a, b in zip(found, run(seed, *arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    text = program.as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_vmap_over_seeds():
    arrays = [jnp.asarray(a, jnp.float32) for a in _case(2, 2, 1, 70, 70, 32, "none")[0]]
    seeds = jnp.asarray(np.stack([_SEED, _SEED + np.int32(5)]))
    attend = lambda seed: attention(*arrays, causal=True, scale=0.2, dropout=0.4, seed=seed, interpret=True)
    found = jax.vmap(attend)(seeds)
    for i in range(2):
        np.testing.assert_allclose(found[i], attend(seeds[i]), rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[0], found[1])


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_compiler_holds_neither_scores_nor_mask(topology):
    pytest.importorskip("libtpu")
    length = 8192 if topology == "v5e:2x2" else 1024

    def step(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1, enable_gqa=True)
        return torch.autograd.grad(out.float().square().mean(), (q, k, v))

    operands = [
        torch.empty(1, n, length, 128, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (8, 2, 2)
    ]
    with torchax.config.override(pallas="required"):
        found = interop.aot_compile(step, tuple(operands), topology, mesh={"data": 1})
    assert found.kernels == {"masked_attention": 1, "masked_attention_dq": 1, "masked_attention_dkv": 1}
    print(f"\ndropout, {topology}, {length} tokens: {found.temporary_bytes / 2**20:.1f} MiB")
    assert found.temporary_bytes < 64 * 2**20  # 8 heads' scores of 8,192 tokens take 2 GiB
