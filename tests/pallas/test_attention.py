"""The attention kernels, interpreted on CPU, against the reference in float64; and which calls they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchax
from hypothesis import given
from hypothesis import strategies as st

from helpers import examples

lowerings = pytest.importorskip("torchax_ops_pallas.lowerings")
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from torchax_ops_pallas import conditions, reference  # noqa: E402
from torchax_ops_pallas.attention import attention  # noqa: E402


def _case(batch, heads, key_heads, length, keys, features, mask):
    rng = np.random.default_rng(length + keys)
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


def _value_and_gradients(attend, arrays, dtype):
    arrays = [jnp.asarray(a, dtype) for a in arrays]
    out, pull = jax.vjp(attend, *arrays)
    return [np.asarray(x, np.float64) for x in (out, *pull(out))]


def _compare(arrays, mask, causal, dtype=jnp.float32, interpret=True):
    mask = None if mask is None else jnp.asarray(mask, None if mask.dtype == bool else jnp.float32)
    found = _value_and_gradients(
        lambda *x: attention(*x, mask, causal=causal, scale=0.2, interpret=interpret), arrays, dtype
    )
    with jax.enable_x64(True):
        expected = _value_and_gradients(
            lambda *x: reference.attention(*x, mask, causal=causal, scale=0.2), arrays, jnp.float64
        )
    tolerance = 1e-5 if dtype == jnp.float32 else 4e-2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@examples(3)
@given(
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    length=st.integers(64, 200),
    keys=st.integers(64, 200),
    features=st.sampled_from([64, 80, 96]),
    mask=st.sampled_from(["none", "bool", "of keys", "added"]),
    causal=st.booleans(),
)
def test_values_and_gradients_equal_the_reference(heads, length, keys, features, mask, causal):
    _compare(*_case(1, *heads, length, keys, features, mask), causal)


@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize("features", [64, 80, 96, 128, 256])
def test_widths_of_heads(features, mask):
    _compare(*_case(1, 2, 1, 130, 150, features, mask), mask == "none")


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_bfloat16(mask):
    _compare(*_case(1, 2, 1, 130, 150, 64, mask), False, jnp.bfloat16)


@pytest.mark.parametrize("mask", ["bool", "added"])
def test_the_interpreter_sees_no_race_and_nothing_out_of_bounds(mask):
    checks = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    _compare(*_case(1, 2, 1, 130, 150, 64, mask), True, interpret=checks)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_a_learned_bias_has_a_gradient():
    arrays, bias = _case(1, 2, 1, 70, 80, 64, "added")
    q, k, v, bias = (jnp.asarray(x, jnp.float32) for x in (*arrays, bias))

    def gradient(attend):
        return jax.grad(lambda b: jnp.square(attend(q, k, v, b, causal=False, scale=0.2)).sum())(bias)

    found = gradient(lambda *x, **options: attention(*x, interpret=True, **options))
    np.testing.assert_allclose(found, gradient(reference.attention), rtol=1e-4, atol=1e-5)


def test_through_torch():
    q, k, v = torch.randn(1, 4, 100, 64), torch.randn(1, 2, 130, 64), torch.randn(1, 2, 130, 64)
    mask = torch.rand(100, 130) > 0.3

    def run(device):
        leaves = [t.detach().to(device).requires_grad_() for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*leaves, attn_mask=mask.to(device), enable_gqa=True)
        out.square().sum().backward()
        return [out.detach().cpu(), *(t.grad.cpu() for t in leaves)]

    with torchax.config.override(pallas="interpret"):
        found = run("jax")
    torch.testing.assert_close(found, run("cpu"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dropout", "words"), [(0.0, "platforms tpu and gpu"), (0.5, "platforms tpu and gpu"), (1.0, "dropout_p must be")]
)
def test_required_says_what_failed(dropout, words):
    q = torch.randn(1, 2, 64, 64, device="jax")
    with torchax.config.override(pallas="required"), pytest.raises(lowerings.KernelUnavailable, match=words):
        F.scaled_dot_product_attention(q, q, q, dropout_p=dropout)
    assert F.scaled_dot_product_attention(q, q, q).shape == q.shape


_PLAIN = (2, 4, 128, 64)


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        ((_PLAIN,) * 3, {}, None),
        ((_PLAIN, (2, 2, 100, 64), (2, 2, 100, 80)), {"enable_gqa": True}, None),
        ((_PLAIN, (2, 2, 100, 64), (2, 2, 100, 64)), {}, "heads do not share"),
        ((_PLAIN,) * 3, {"dropout_p": 0.1}, None),
        ((_PLAIN,) * 3, {"dropout_p": 1.0}, "dropout"),
        (((4, 128, 64),) * 3, {}, "dimensions"),
        (((2, 4, 8, 64), _PLAIN, _PLAIN), {}, "too few"),
        (((2, 4, 128, 512),) * 3, {}, "wide"),
        ((_PLAIN,) * 3, {"attn_mask": jax.ShapeDtypeStruct((128, 128), jnp.bool_)}, None),
        ((_PLAIN,) * 3, {"attn_mask": jax.ShapeDtypeStruct((3, 128, 128), jnp.bool_)}, "broadcast"),
        ((_PLAIN,) * 3, {"attn_mask": jax.ShapeDtypeStruct((128, 128), jnp.float16)}, "mask must be"),
    ],
)
def test_which_calls_are_taken(shapes, options, words):
    refusal = conditions.unfit(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes), **options)
    assert refusal is None if words is None else words in refusal


def test_a_kernel_fits_also_where_tensors_are_divided(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 2, 1024, 64), jnp.float32)
    monkeypatch.setattr(torchax._sharding.pins, "epoch", 1)  # as shard_module does
    assert lowerings.choice.on_tpu(x, x, x)


def test_small_scores_are_left_to_xla_unless_a_kernel_is_required():
    shaped = lambda *shape: (jax.ShapeDtypeStruct(shape, jnp.float32),) * 3
    x = shaped(2, 4, 256, 64)
    assert "256 by 256 and 2 MiB in all" in str(lowerings.choice.on_tpu.refusal(*x))
    assert lowerings.choice.on_tpu(*shaped(4, 4, 256, 64)) and lowerings.choice.on_tpu(*shaped(1, 1, 512, 64))
    with torchax.config.override(pallas="required"):
        assert lowerings.choice.on_tpu(*x)


def test_the_interpreter_sees_an_index_map_that_leaves_the_array():
    def double(x, shift):
        kernel = lambda x_ref, out_ref: out_ref.__setitem__(..., x_ref[...] * 2)
        block = lambda shift: pl.BlockSpec((8, 128), lambda i: (i + shift, 0))
        return pl.pallas_call(
            kernel,
            grid=(2,),
            in_specs=[block(shift)],
            out_specs=block(0),
            out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
            interpret=pltpu.InterpretParams(out_of_bounds_reads="raise"),
        )(x)

    x = jnp.ones((16, 128), jnp.float32)
    assert (double(x, 0) == 2).all()
    with pytest.raises(Exception, match="(?i)out.of.bounds"):
        double(x, 1).block_until_ready()
