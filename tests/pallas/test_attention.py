"""The attention kernel, interpreted on CPU, against the reference; and which calls the kernels take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

lowerings = pytest.importorskip("torchax_ops_pallas.lowerings")
from torchax_ops_pallas import reference  # noqa: E402
from torchax_ops_pallas.attention import fused_attention  # noqa: E402


def _inputs(shape, keys, dtype):
    rng = np.random.default_rng(0)
    batch, heads, length, features = shape
    draw = [(batch, heads, n, features) for n in (length, keys, keys)]
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in draw]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("keys", "causal"), [(256, False), (128, False), (256, True)])
def test_fused_attention_equals_reference(dtype, keys, causal):
    query, key, value = _inputs((1, 2, 256, 64), keys, dtype)
    out = fused_attention(query, key, value, causal, 0.125, True)
    expected = reference.attention(query, key, value, causal, 0.125)
    assert out.dtype == dtype and out.shape == query.shape
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
    )


def test_gradients_equal_those_of_reference():
    inputs = _inputs((1, 1, 128, 64), 128, jnp.float32)

    def loss(attend):
        return jax.grad(lambda q, k, v: jnp.square(attend(q, k, v)).sum(), argnums=(0, 1, 2))(*inputs)

    found = loss(lambda q, k, v: fused_attention(q, k, v, True, 0.125, True))
    expected = loss(lambda q, k, v: reference.attention(q, k, v, True, 0.125))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"is_causal": True}, True),
        ({"scale": 0.5}, True),
        ({"dropout_p": 0.1}, False),
        ({"attn_mask": jax.ShapeDtypeStruct((128, 128), jnp.bool_)}, False),
    ],
)
def test_which_calls_are_taken(change, taken):
    shape = jax.ShapeDtypeStruct((2, 4, 128, 64), jnp.bfloat16)
    assert lowerings._short_keys(shape, shape, shape, **change) is taken


@pytest.mark.parametrize("shape", [(2, 4, 100, 64), (2, 4, 128, 40), (4, 128, 64)])
def test_shapes_off_the_tiles_are_left_to_xla(shape):
    aval = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert not lowerings._plain(aval, aval, aval)


def test_long_keys_go_to_flash_attention():
    aval = jax.ShapeDtypeStruct((1, 8, 16384, 128), jnp.bfloat16)
    assert lowerings._plain(aval, aval, aval) and not lowerings._short_keys(aval, aval, aval)


def test_kernels_lower_for_tpu():
    query, key, value = (jax.ShapeDtypeStruct((1, 2, 256, 128), jnp.bfloat16) for _ in range(3))
    for kernel in (lowerings.short_attention, lowerings.long_attention):
        for causal in (False, True):
            program = jax.jit(lambda q, k, v, kernel=kernel, causal=causal: kernel(q, k, v, is_causal=causal))
            assert "tpu_custom_call" in jax.export.export(program, platforms=["tpu"])(query, key, value).mlir_module()


@pytest.mark.parametrize("wide", [False, True])
def test_gradients_lower_for_tpu(wide):
    aval = jax.ShapeDtypeStruct((1, 2, 256, 128), jnp.bfloat16)

    def gradients(query, key, value, grad):
        return jax.vjp(lambda *x: lowerings.long_attention(*x, is_causal=True), query, key, value)[1](grad)

    with jax.enable_x64(wide):
        module = jax.export.export(jax.jit(gradients), platforms=["tpu"])(aval, aval, aval, aval).mlir_module()
    assert module.count("tpu_custom_call") >= 3
