"""The kernels and a model compiled by the real TPU compiler (libtpu), on a machine without a TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tpu_programs import compile_for_tpu, devices

pytest.importorskip("libtpu")
pytest.importorskip("torchax_ops_pallas")
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax import convert
from torchax_ops_pallas.attention import attention

pytestmark = pytest.mark.tpu_aot


def _train(*operands, causal):
    query, key, value, *mask = operands

    def loss(*qkv):
        return attention(*qkv, *mask, causal=causal, scale=0.1).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)


_WIDE = [(8, 2, 1024, 1024, 128, jnp.bfloat16), (4, 2, 1000, 700, 80, jnp.bfloat16), (2, 1, 600, 600, 256, jnp.float32)]
_ROWS = [("v5e:2x2", *c) for c in [*_WIDE, (4, 4, 100, 70, 64, jnp.float32), (2, 2, 4096, 4096, 96, jnp.bfloat16)]] + [
    (t, *c) for t in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2") for c in _WIDE[2:]
]


@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize(("topology", "heads", "key_heads", "length", "keys", "features", "dtype"), _ROWS)
def test_kernels_compile(topology, heads, key_heads, length, keys, features, dtype, mask):
    query = jax.ShapeDtypeStruct((1, heads, length, features), dtype)
    key = jax.ShapeDtypeStruct((1, key_heads, keys, features), dtype)
    masks = () if mask == "none" else (jax.ShapeDtypeStruct((length, keys), jnp.bool_),)
    program = compile_for_tpu(functools.partial(_train, causal=True), query, key, key, *masks, topology=topology)
    assert program.as_text().count("tpu_custom_call") >= 3


def _llama_block():
    import torch
    import torchax
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=2, vocab_size=64
    )
    config._attn_implementation = "sdpa"
    block, rotary = LlamaDecoderLayer(config, 0).bfloat16(), LlamaRotaryEmbedding(config)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block
            self.rotary = rotary

        def forward(self, x):
            positions = torch.arange(x.shape[1], device=x.device)[None]
            return self.block(x, position_embeddings=self.rotary(x, positions))

    weights, function = torchax.extract_jax(Block().eval())
    return weights, lambda w, x: function(w, (x,))


def test_a_llama_block_of_8k_tokens_uses_the_kernel():
    import torchax

    weights, function = _llama_block()
    x = jax.ShapeDtypeStruct((1, 8192, 1024), jnp.bfloat16)
    leaves, tree = jax.tree.flatten(weights)
    with torchax.config.override(pallas="required"), convert.compiling_for("tpu"):
        program = compile_for_tpu(lambda x, *w: function(tree.unflatten(w), x), x, *leaves)
    assert "tpu_custom_call" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 0.25 * 8 * 8192**2 * 2  # the scores of 8 heads


@pytest.mark.usefixtures("full_effort")
def test_a_divided_train_step_of_a_llama_block_uses_the_kernels():
    import torchax

    weights, function = _llama_block()
    mesh = Mesh(devices().reshape(2, 2), ("data", "model"))

    def shape(x, *spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def place(path, x):  # by outputs what widens, by inputs what narrows
        name = jax.tree_util.keystr(path)
        narrow = "o_proj" in name or "down_proj" in name
        return shape(x, *((None, "model") if narrow else ("model",)) if x.ndim == 2 else ())

    weights = jax.tree_util.tree_map_with_path(place, weights)
    x = shape(jax.ShapeDtypeStruct((2, 8192, 1024), jnp.bfloat16), "data")

    def step(weights, x):
        loss = lambda weights: jnp.square(jax.tree.leaves(function(weights, x))[0].astype(jnp.float32)).mean()
        return jax.grad(loss)(weights)

    with torchax.config.override(pallas="required"), convert.compiling_for("tpu"):
        program = jax.jit(lambda *a: step(*a)).trace(weights, x).lower(lowering_platforms=("tpu",)).compile()
    text = program.as_text()
    assert text.count("tpu_custom_call") == 3  # forward, dq, dk and dv
    assert "bf16[1,4,8192,128]" in text  # one sequence of two, four heads of eight
    assert "all-to-all" not in text
    assert program.memory_analysis().temp_size_in_bytes < 0.4 * 4 * 8192**2 * 2  # the scores of 4 heads


def test_a_kernel_that_exceeds_the_vector_memory_is_refused():
    block = pl.BlockSpec((4096, 16384), lambda i: (i, 0))

    def double(x):
        kernel = lambda x_ref, out_ref: out_ref.__setitem__(..., x_ref[...] * 2)
        return pl.pallas_call(
            kernel, grid=(2,), in_specs=[block], out_specs=block, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype)
        )(x)

    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)vmem"):
        compile_for_tpu(double, jax.ShapeDtypeStruct((8192, 16384), jnp.float32))
