"""Matrix products compiled by the real TPU compiler (libtpu), on a machine without a TPU."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("libtpu")
pytest.importorskip("torchax_ops_pallas")
os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_LOG_DIR="disabled"
)
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax_ops_pallas.grouped import grouped_matmul

pytestmark = pytest.mark.tpu_aot
_TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@functools.cache
def _mesh(topology):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices[:1]), ("x",))


def _compile(function, *shapes, topology):
    mesh = _mesh(topology)
    avals = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, PartitionSpec())) for s in shapes]
    with jax.sharding.set_mesh(mesh):
        return jax.jit(function).trace(*avals).lower(lowering_platforms=("tpu",)).compile()


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

    program = _compile(train, *shapes, jax.ShapeDtypeStruct((groups,), jnp.int32), topology=topology)
    text, cost = program.as_text(), program.cost_analysis()
    assert text is not None and text.count("tpu_custom_call") >= 3
    products = 3 * 2 * rows * k * n
    assert cost is not None and cost["flops"] < 1.5 * products


def test_the_plain_lowering_compiles_bfloat16_at_the_highest_precision():
    from torchax_ops_aten.grouped import grouped_mm

    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((256, 128), (4, 128, 128))]
    with jax.default_matmul_precision("highest"):
        program = _compile(grouped_mm, *shapes, jax.ShapeDtypeStruct((4,), jnp.int32), topology="v5e:2x2")
    text = program.as_text()
    assert text is not None and "tpu_custom_call" in text
