"""The kernels of matrix products, interpreted on CPU, against the reference in float64; and which calls they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchax
from hypothesis import given
from hypothesis import strategies as st

from helpers import examples

pytest.importorskip("torchax_ops_pallas")
from torchax_ops_pallas import reference
from torchax_ops_pallas.grouped import grouped_matmul, grouped_outer
from torchax_ops_pallas.lowerings import KernelUnavailable


def _value_and_gradients(function, arrays, dtype):
    out, pull = jax.vjp(function, *(jnp.asarray(a, dtype) for a in arrays))
    return [np.asarray(x, np.float64) for x in (out, *pull(out))]


def _compare(function, meaning, arrays, dtype):
    found = _value_and_gradients(function, arrays, dtype)
    with jax.enable_x64(True):
        expected = _value_and_gradients(
            meaning, [np.asarray(jnp.asarray(a, dtype), np.float64) for a in arrays], jnp.float64
        )
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@examples(3)
@given(
    sizes=st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any),
    beyond=st.sampled_from([0, 3, 200]),
    features=st.tuples(st.sampled_from([16, 100, 130]), st.sampled_from([8, 128, 200])),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_groups(sizes, beyond, features, dtype):
    rng = np.random.default_rng(sum(sizes))
    ends, (k, n) = jnp.asarray(np.cumsum(sizes), jnp.int32), features
    rows = sum(sizes) + beyond
    x, y = rng.standard_normal((rows, k)), rng.standard_normal((rows, n))
    matrices = rng.standard_normal((len(sizes), k, n))
    _compare(
        lambda x, w: grouped_matmul(x, w, ends, True),
        lambda x, w: reference.grouped_matmul(x, w, ends),
        (x, matrices),
        dtype,
    )
    _compare(
        lambda x, y: grouped_outer(x, y, ends, True), lambda x, y: reference.grouped_outer(x, y, ends), (x, y), dtype
    )


@pytest.mark.parametrize("turned", [False, True])
def test_grouped_mm_of_torch(turned):
    offs = torch.tensor([3, 3, 40], dtype=torch.int32)
    cpu = [torch.randn(40, 16), torch.randn(3, 32, 16) if turned else torch.randn(3, 16, 32)]

    def gradients(device):
        x, w = (t.detach().to(device).requires_grad_() for t in cpu)
        out = torch.nn.functional.grouped_mm(x, w.transpose(-2, -1) if turned else w, offs=offs.to(device))
        out.square().sum().backward()
        return [t.detach().cpu() for t in (out, x.grad, w.grad) if t is not None]

    expected = gradients("cpu")
    with torchax.config.override(pallas="interpret"):
        torch.testing.assert_close(gradients("jax"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients("jax"), expected, rtol=1e-4, atol=1e-4)


def test_required_says_which_condition_failed():
    x, w, offs = torch.randn(3, 16, 16), torch.randn(3, 16, 16), None
    with torchax.config.override(pallas="required"), pytest.raises(KernelUnavailable, match="offs"):
        torch._grouped_mm(x.to("jax"), w.to("jax"), offs=offs)
    offs = torch.tensor([1, 2, 3], dtype=torch.int32, device="jax")
    with torchax.config.override(pallas="required"), pytest.raises(KernelUnavailable, match="platform tpu"):
        torch._grouped_mm(x[0].to("jax"), w.to("jax"), offs=offs)


def test_grouped_mm_splits_columns_of_bfloat16():
    offs = torch.tensor([3, 3, 8], dtype=torch.int32)
    x, w = torch.randn(3, 16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    found = torch._grouped_mm(x.to("jax"), w.to("jax"), offs=offs.to("jax"))
    expected = torch.cat([x[0] @ w[:, :3], x[2] @ w[:, 3:]], 1)
    torch.testing.assert_close(found.cpu(), expected)
    with pytest.raises(RuntimeError, match="Bias not supported yet"):
        torch._grouped_mm(x.to("jax"), w.to("jax"), offs=offs.to("jax"), bias=w[0].to("jax"))
