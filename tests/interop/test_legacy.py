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


def test_autocast() -> None:
    x = torch.ones(2, 2, device="jax")
    for scope in (
        torchax.amp.autocast("jax", dtype=torch.bfloat16),
        torchax.amp.autocast("jax", torch.bfloat16, env=torchax.default_env()),
        torchax.amp.autocast(),
    ):
        with scope:
            assert (x @ x).dtype == torch.bfloat16
    with torchax.amp.autocast("jax", dtype=torch.float16):
        assert (x @ x).dtype == torch.float16
        with torchax.amp.autocast(False):
            assert (x @ x).dtype == torch.float32
    with pytest.raises(ValueError, match=r"for device 'jax'; got 'cpu'"):
        torchax.amp.autocast("cpu")


def test_seeds_and_settings() -> None:
    env = torchax.default_env()
    env.manual_seed(3)
    first = torch.rand(4, device="jax")
    env.manual_seed(3)
    assert torch.equal(torch.rand(4, device="jax"), first)
    torch.jax.manual_seed(3)
    assert torch.equal(torch.rand(4, device="jax"), first)
    assert isinstance(env.prng_key, jax.Array)
    assert env.config is torchax.config and env.config.eager == "strict"
    with env.config.override(eager="debug"):
        assert torchax.config.eager == "debug"
    with pytest.raises(AttributeError, match="has no setting 'nothing'; it has compilation_cache, eager"):
        env.config.nothing = 1


def test_accuracy_and_performance_mode() -> None:
    before = jax.config.jax_default_matmul_precision
    x = jnp.ones((2, 2))
    product = torchax.interop.jax_view(lambda a, b: a @ b)
    try:
        torchax.enable_accuracy_mode()
        assert "HIGHEST" in str(jax.make_jaxpr(product)(x, x))
        torchax.enable_performance_mode()
        assert "HIGHEST" not in str(jax.make_jaxpr(product)(x, x))
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_override_op_definition() -> None:
    from torchax._registry import REGISTRY

    env, x = torchax.default_env(), torch.ones(2, device="jax")
    known = {name: list(entries) for name, entries in REGISTRY._by_op.items() if name in ("aten::sinc", "aten::erfcx")}
    try:
        env.override_op_definition(torch.ops.aten.sinc.default, lambda a: a + 41)
        assert torch.sinc(x).tolist() == [42, 42]
        env.override_op_definition(torch.ops.aten.sinc, lambda a: a + 42)  # a packet; the last one counts
        assert torch.sinc(x).tolist() == [43, 43]
        assert torchax.compile(torch.sinc)(x).tolist() == [43, 43]
        np.testing.assert_array_equal(jax.jit(torchax.interop.jax_view(torch.sinc))(jnp.ones(1)), [43])
    finally:
        for name in [
            e.provider for e in REGISTRY.lowerings(torch.ops.aten.sinc.default) if e.provider.startswith("override")
        ]:
            REGISTRY.remove(name)
    assert torch.sinc(x).tolist() == torch.sinc(torch.ones(2)).tolist()
    assert known["aten::sinc"] == list(REGISTRY._by_op["aten::sinc"])


def test_functions_and_modules_by_their_names() -> None:
    """What notebooks write: a module's state out, a function of it under JAX, in and out of nests."""
    model = torch.nn.Linear(2, 2)
    env = torchax.default_env()
    with env:
        model.to("jax")
        weights, fn = torchax.extract_jax(model)
        assert fn(weights, (jnp.ones((1, 2)),)).shape == (1, 2)
        nest = env.t2j_iso({"w": model.weight.detach()})
        assert isinstance(nest["w"], jax.Array) and type(env.j2t_iso(nest)["w"]) is torchax.tensor.Tensor
        assert env.to_xla([torch.ones(2)])[0].device.type == "jax"
    gradients = torchax.interop.jax_value_and_grad(lambda w: (w["weight"] ** 2).sum())(dict(model.named_parameters()))
    assert gradients[1]["weight"].shape == (2, 2)


def test_modules_resolve() -> None:
    import torchax.amp
    import torchax.flax
    import torchax.interop
    import torchax.train

    assert callable(torchax.train.make_train_step) and torchax.flax.FlaxNNModule is torchax.flax.FlaxNNModule
    for name in ("jax_view", "torch_view", "call_jax", "call_torch", "j2t_autograd", "t2j_autograd", "jax_jit", "jax_value_and_grad",
                 "jax_vmap", "jax_shard_map", "shard_map", "gradient_checkpoint", "fori_loop", "scan", "JittableModule",
                 "extract_all_buffers", "extract_jax"):  # fmt: skip
        assert callable(getattr(torchax.interop, name)), name
