"""Matrix products compiled by the real TPU compiler (libtpu), on a machine without a TPU."""

import jax
import jax.numpy as jnp
import pytest

from tpu_programs import compile_for_tpu

pytest.importorskip("libtpu")
pytest.importorskip("torchax_ops_pallas")
from torchax_ops_pallas.grouped import grouped_matmul

pytestmark = pytest.mark.tpu_aot
_TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@pytest.mark.parametrize("topology", _TOPOLOGIES)
@pytest.mark.parametrize(
    ("rows", "k", "n", "groups", "dtype"), [(4096, 1024, 1408, 64, jnp.bfloat16), (1000, 500, 300, 8, jnp.float32)]
)
def test_groups_are_not_multiplied_by_all_matrices(topology, rows, k, n, groups, dtype):
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((rows, k), (groups, k, n), (rows, n))]

    def train(x, matrices, grad, ends):
        with jax.default_matmul_precision("highest"):  # as torch asks for float32
            out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, ends), x, matrices)
            return out, pull(grad)

    program = compile_for_tpu(train, *shapes, jax.ShapeDtypeStruct((groups,), jnp.int32), topology=topology)
    text, cost = program.as_text(), program.cost_analysis()
    assert text is not None and text.count("tpu_custom_call") >= 3
    products = 3 * 2 * rows * k * n
    assert cost is not None and cost["flops"] < 1.5 * products


def test_the_plain_lowering_compiles_bfloat16_at_the_highest_precision():
    from torchax_ops_aten.grouped import grouped_mm

    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((256, 128), (4, 128, 128))]
    with jax.default_matmul_precision("highest"):
        program = compile_for_tpu(grouped_mm, *shapes, jax.ShapeDtypeStruct((4,), jnp.int32), topology="v5e:2x2")
    text = program.as_text()
    assert text is not None and "tpu_custom_call" in text
