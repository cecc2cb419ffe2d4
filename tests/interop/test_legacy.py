"""The names that existing users of torchax import, used in the way they use them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchax


def test_mappings() -> None:
    from torchax.ops.mappings import TORCH_DTYPE_TO_JAX, j2t, j2t_dtype, t2j, t2j_dtype

    assert t2j_dtype(torch.bfloat16) == jnp.bfloat16 and j2t_dtype(jnp.dtype("int8")) is torch.int8
    assert TORCH_DTYPE_TO_JAX[torch.float32] == np.float32
    assert isinstance(t2j(torch.ones(2)), jax.Array) and type(j2t(jnp.ones(2))) is torchax.tensor.Tensor


def test_environment() -> None:
    with torchax.default_env() as env:
        t = torchax.tensor.Tensor(jnp.ones(2), env)
        assert torchax.interop.jax_view(t).shape == (2,)
    torchax.enable_globally()
    torchax.disable_globally()


def test_apply_jax_and_sharding(jax_devices: list[jax.Device]) -> None:
    t = torch.ones(4, device="jax")
    assert t.apply_jax(jnp.sin).shape == (4,)
    t.apply_jax_(lambda a: a * 2)
    mesh = jax.sharding.Mesh(np.array(jax_devices[:2]), ("x",))
    t.shard_(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    assert t.tolist() == [2] * 4 and len(t.jax().sharding.device_set) == 2


def test_view() -> None:
    import torchax.view

    x = torch.ones(2, 3, device="jax")
    assert isinstance(x[0], torchax.view.View) and not isinstance(x, torchax.view.View)
    assert not isinstance(torch.ones(2)[0], torchax.view.View)


@pytest.mark.parametrize("is_jax_function", [True, False])
def test_register_function(is_jax_function: bool) -> None:
    from torchax.ops.jtorch import register_function

    original = torch.nn.functional.hardtanh
    try:

        @register_function(torch.nn.functional.hardtanh, is_jax_function=is_jax_function)
        def other(x: jax.Array, **kwargs: float) -> jax.Array:
            assert isinstance(x, jax.Array) is is_jax_function
            return x + 100

        assert torch.nn.functional.hardtanh(torch.ones(1, device="jax")).item() == 101
        assert torch.nn.functional.hardtanh(torch.ones(1)).item() == 1
    finally:
        torch.nn.functional.hardtanh = original


def test_everything_resolves() -> None:
    for name in torchax.interop.__all__:
        assert getattr(torchax.interop, name) is not None
    for name in ("compile", "extract_jax", "save_checkpoint", "load_checkpoint", "interop", "view"):
        assert getattr(torchax, name) is not None
