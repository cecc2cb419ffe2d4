"""Kernels that are broken on purpose, as proof that the checks have teeth.

Two more stand beside the kernels that they are about: one beyond the vector memory in `test_tpu_aot`, an index map that leaves the array in
`test_attention`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torchax_ops_pallas")
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_programs import compile_for_tpu


def _copied(x, waits, interpret):
    """`x`, copied through the vector memory by a transfer that is waited for, or not."""

    def kernel(x_ref, out_ref, held_ref, arrived):
        transfer = pltpu.make_async_copy(x_ref, held_ref, arrived)
        transfer.start()
        if waits:
            transfer.wait()
        out_ref[...] = held_ref[...]
        if not waits:
            transfer.wait()

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=interpret,
    )(x)


def test_the_interpreter_sees_data_that_are_not_waited_for():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    x = jnp.arange(8 * 128, dtype=jnp.float32).reshape(8, 128)
    checks = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait")
    for waits in (True, False):
        found = np.asarray(_copied(x, waits, checks))
        races = interpret_pallas_call.races
        assert races is not None and races.races_found is not waits
        assert np.array_equal(found, x) is waits
    assert np.isnan(found).all()


@pytest.mark.tpu_aot
@pytest.mark.parametrize("stride", [128, 64])
def test_the_compiler_refuses_a_slice_that_is_not_aligned(stride):
    def gathered(x):
        def kernel(x_ref, out_ref):
            out_ref[...] = x_ref[:, pl.ds(pl.program_id(0) * stride, 128)]

        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 512), lambda i: (0, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, i)),
            out_shape=jax.ShapeDtypeStruct((8, 512), x.dtype),
        )(x)

    shape = jax.ShapeDtypeStruct((8, 512), jnp.float32)
    if stride == 128:
        assert "tpu_custom_call" in compile_for_tpu(gathered, shape).as_text()
        return
    with pytest.raises(Exception, match="multiple of 128"):
        compile_for_tpu(gathered, shape)
