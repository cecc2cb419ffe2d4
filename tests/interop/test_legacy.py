"""The names that existing users of torchax import, used in the way they use them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchax


def test_mappings() -> None:
    from torchax.ops.mappings import TORCH_DTYPE_TO_JAX, j2t_dtype, t2j, t2j_dtype

    assert t2j_dtype(torch.bfloat16) == jnp.bfloat16 and j2t_dtype(jnp.dtype("int8")) is torch.int8
    assert TORCH_DTYPE_TO_JAX[torch.float32] == np.float32
    assert isinstance(t2j(torch.ones(2)), jax.Array) and isinstance(t2j(torch.ones(2), use_dlpack=False), jax.Array)


def test_values_to_the_other_world() -> None:
    """`j2t` gives what is compared with CPU torch, of arrays, tensors and nests; `t2j` takes nests, too."""
    from torchax.tensor import j2t, t2j

    weight, scale = j2t((jnp.ones(2, jnp.bfloat16), jnp.full((), 3)))
    layer = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    layer.weight.data = weight[None]
    assert layer.weight.device.type == "cpu" and scale.item() == 3
    torch.testing.assert_close(j2t(torch.ones(2, device="jax").to(torch.float32)), torch.ones(2))
    weight[0] = 2  # memory of its own
    env = torchax.default_env()
    arrays = env.t2j_copy({"a": torch.ones(2)})
    assert isinstance(arrays["a"], jax.Array) and torch.equal(env.j2t_copy(arrays)["a"], torch.ones(2))
    back = torchax.interop.torch_view(t2j([torch.ones(2), {"b": torch.zeros(1)}]))
    assert back[1]["b"].device.type == "jax"
    for convert, takes in ((t2j, "torch.Tensor"), (j2t, "jax.Array")):
        with pytest.raises(TypeError, match=f"takes a {takes}, or a nest of them; got list"):
            convert([1, 2])


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
    assert env.config.eager == "strict"
    with env.config.override(eager="debug"):
        assert torchax.config.eager == env.config.eager == "debug"
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


# ---------------------------------------------------------------------- as public code calls them
class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(torch.tanh(self.layer1(x)))

    def decode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        return {"out": self.layer2(x)} if return_dict else (self.layer2(x),)


def mean_square(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.mean((found - target) ** 2)


def as_function(module: Any) -> Any:
    return lambda weights, buffers, args: module.functional_call("forward", weights, buffers, args)


def test_functional_train_step_on_a_mesh(jax_devices: list[jax.Device]) -> None:
    model = torchax.interop.JittableModule(Net().to("jax"))
    optimizer = optax.adam(0.01)
    opt_state = torchax.interop.call_jax(optimizer.init, model.params)
    x, y = torch.randn(8, 4, device="jax"), torch.randn(8, 2, device="jax")
    plain = torchax.train.make_train_step(as_function(model), mean_square, optimizer)
    want = plain(model.params, {}, opt_state, x, y)  # not compiled
    marked = torchax.train.make_train_step(
        as_function(model),
        mean_square,
        optimizer,
        remat_policy=jax.checkpoint_policies.nothing_saveable,
        mark_fsdp_sharding_axis="fsdp",
    )
    step = torchax.interop.jax_jit(marked, kwargs_for_jax_jit={"donate_argnums": (0, 2)})
    weights = dict(model.params)
    with jax.set_mesh(torchax.interop.make_mesh(fsdp=4)):
        assert "sharding" in step.lower(weights, model.buffers, opt_state, x, y).as_text()
        loss, model.params, opt_state = step(weights, model.buffers, opt_state, x, y)
    torch.testing.assert_close(loss, want[0])
    torch.testing.assert_close(model.params["layer1.weight"], want[1]["layer1.weight"], rtol=1e-3, atol=1e-5)
    with pytest.warns(DeprecationWarning), jax.make_mesh((4,), ("fsdp",)):
        assert "sharding" in step.lower(weights, model.buffers, opt_state, x, y).as_text()
    with pytest.raises(RuntimeError, match="there is no mesh"):
        marked(model.params, {}, opt_state, x, y)
    with pytest.raises(TypeError, match="shard_batch"):
        torchax.train.make_train_step(Net(), mean_square, optimizer, mark_fsdp_sharding_axis="fsdp")


def test_functional_train_step_with_frozen_weights() -> None:
    model = Net().to("jax")
    model.layer1.requires_grad_(False)
    jitted = torchax.interop.JittableModule(model)
    optimizer = optax.sgd(0.1, momentum=0.9)
    frozen = lambda name, weight: not weight.requires_grad
    step = torchax.interop.jax_jit(
        torchax.train.make_train_step(as_function(jitted), mean_square, optimizer, frozen_params_filter=frozen)
    )
    weights = dict(jitted.params)
    opt_state = torchax.interop.call_jax(optimizer.init, {k: v for k, v in weights.items() if v.requires_grad})
    _, updated, _ = step(
        weights, jitted.buffers, opt_state, torch.ones(8, 4, device="jax"), torch.ones(8, 2, device="jax")
    )
    assert list(updated) == list(weights)
    assert torch.equal(updated["layer1.weight"], weights["layer1.weight"])
    assert not torch.equal(updated["layer2.weight"], weights["layer2.weight"])


def test_flax_module() -> None:
    from flax import linen
    from torchax.flax import FlaxNNModule

    class CNN(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(3)(linen.relu(linen.Conv(4, (3, 3))(x)).reshape((x.shape[0], -1)))

    cnn, inputs, env = CNN(), jnp.ones((1, 8, 8, 1)), torchax.default_env()
    state = cnn.init(env.prng_key, inputs)
    expected = cnn.apply(state, inputs)
    module = FlaxNNModule(env, cnn, (inputs,), {})  # made of the same key, which only reading has not used up
    np.testing.assert_allclose(module.forward(inputs).jax(), expected, rtol=1e-5)

    @torchax.interop.jax_jit
    def call(weights: Any, args: Any) -> Any:
        return torch.func.functional_call(module, weights, args)

    with env:
        found = call(module.state_dict(), torch.ones((1, 8, 8, 1), device="jax"))
    np.testing.assert_allclose(found.jax(), expected, rtol=1e-5)
    other = FlaxNNModule(env, cnn, (inputs,))
    assert not torch.equal(other.params.get_parameter("Dense_0.kernel"), module.params.get_parameter("Dense_0.kernel"))


def test_override_of_a_function() -> None:
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention
    env = torchax.default_env()

    def custom(
        query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False, offset: int = 41
    ) -> Any:
        (array,) = torchax.interop.jax_view((query,))
        return torchax.interop.torch_view(array + offset)

    try:
        env.override_op_definition(functional.scaled_dot_product_attention, custom)
        q = torch.ones(1, 2, 4, 8, device="jax")
        attend = lambda q: functional.scaled_dot_product_attention(q, q, q, is_causal=True)[0, 0, 0, 0]
        assert attend(q).item() == 42 and torchax.compile(attend)(q).item() == 42
        assert attend(q.cpu()).item() == 1
        env.override_op_definition(functional.scaled_dot_product_attention, functools.partial(custom, offset=1))
        assert attend(q).item() == 2
    finally:
        functional.scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention = original


def test_compile_options(jax_devices: list[jax.Device]) -> None:
    model, x = Net().to("jax"), torch.randn(2, 4, device="jax")
    options = torchax.CompileOptions(
        methods_to_compile=["forward", "decode"], jax_jit_kwargs={"static_argnames": ("return_dict",)}
    )
    compiled = torchax.compile(model, options)
    torch.testing.assert_close(compiled(x), model(x))
    (out,) = compiled.decode(x, return_dict=False)
    torch.testing.assert_close(out, model.decode(x)["out"])
    torch.testing.assert_close(compiled.decode(x)["out"], out)
    assert compiled._jitted["decode"].cache_info().misses == 2
    sharding = jax.sharding.NamedSharding(jax.make_mesh((4,), ("x",)), jax.sharding.PartitionSpec())
    compiled.params = {k: v.apply_jax_(jax.device_put, sharding) for k, v in compiled.params.items()}
    compiled.buffers = dict(compiled.buffers)
    torch.testing.assert_close(compiled(x), model(x))
    assert torchax.compile(lambda x: x * 2, torchax.CompileOptions())(x).shape == x.shape
    with pytest.raises(ValueError, match="torchax.export.export"):
        torchax.CompileOptions(mode="export")


def test_settings_of_earlier_versions() -> None:
    env = torchax.default_env()
    before = dict(env.config.former)
    try:
        env.config.use_tpu_flash_attention = env.config.shmap_flash_attention = True
        env.config.use_torch_native_for_cpu_tensor = env.config.use_dlpack_for_data_conversion = False
        assert env.config.use_tpu_flash_attention is True and env.config.debug_print_each_op is False
        env._mesh = env.default_device_or_sharding = None
    finally:
        env.config.former.update(before)
    assert env.enabled
    env.load_ops()
    assert next(env.to_xla(Net()).parameters()).device.type == "jax"
    key = jax.random.key_data(env.prng_key)
    assert (jax.random.key_data(env.prng_key) == key).all()
    env.get_and_rotate_prng_key()
    assert not (jax.random.key_data(env.prng_key) == key).all()


def test_mesh_util(jax_devices: list[jax.Device]) -> None:
    from torchax.mesh_util import Mesh, SingleAxisSharder

    model = Mesh.fsdp_mesh().initialize_model_sharded(torch.nn.Linear, (8, 8))
    for parameter in model.parameters():
        assert len(parameter.jax().addressable_shards) == len(jax.devices())
    sharder = SingleAxisSharder(axis_name="fsdp", axis_size=4)
    assert sharder("name", torch.ones((5, 8, 12))) == jax.sharding.PartitionSpec(None, "fsdp", None)


def test_export() -> None:
    from torchax.export import exported_program_to_jax, exported_program_to_stablehlo

    model, x = Net().eval(), torch.randn(1, 4)
    program = torch.export.export(model, (x,))
    weights, stablehlo = exported_program_to_stablehlo(program)
    assert "stablehlo" in stablehlo.mlir_module()
    env = torchax.default_env()
    weights, fn = exported_program_to_jax(program)
    (found,) = env.j2t_copy(jax.jit(fn)(weights, (env.t2j_copy(x),)))[:1]
    torch.testing.assert_close(found, model(x)[0])
