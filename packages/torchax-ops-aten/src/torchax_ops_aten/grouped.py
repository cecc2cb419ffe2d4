"""Products of more than two matrices at a time: grouped and trilinear."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.dtypes import to_jax
from torchax.ops import aten, lowering

from ._common import accumulator


def _ragged(a, b, sizes, contract, ragged, group, dtype=None):
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contract, ((), ())), lhs_ragged_dimensions=[ragged], rhs_group_dimensions=group
    )
    # XLA's kernel on TPU knows no precision above the default one for 16-bit floats, whose products are exact anyway.
    precision = lax.Precision.DEFAULT if accumulator(a.dtype) != a.dtype else None
    return lax.ragged_dot_general(
        a, b, sizes, numbers, precision=precision, preferred_element_type=dtype or accumulator(a.dtype)
    )


@lowering(aten._grouped_mm.default, meta=False)  # torch's meta kernel wants bfloat16
def grouped_mm(x, mat2, offs=None, bias=None, out_dtype=None):
    """One product for each group; `offs` says where the groups end in the dimension that a 2-d operand is split along.

    x [M, K], mat2 [G, K, N] -> [M, N]; x [G, M, K], mat2 [K, N] -> [M, N]; x [M, K], mat2 [K, N] -> [G, M, N];
    x [G, M, K], mat2 [G, K, N] -> [G, M, N].
    """
    if bias is not None:
        raise RuntimeError("Bias not supported yet")
    dtype = x.dtype if out_dtype is None else to_jax(out_dtype)
    if offs is None:
        return jnp.matmul(x, mat2, preferred_element_type=accumulator(x.dtype)).astype(dtype)
    ends = offs.astype(np.int32)
    sizes = jnp.diff(ends, prepend=jnp.zeros(1, np.int32))
    if x.ndim == 2 and mat2.ndim == 3:
        result = _ragged(x, mat2, sizes, ((1,), (1,)), 0, [0])
    elif x.ndim == 2:
        result = _ragged(x, mat2, sizes, ((1,), (0,)), 1, [])
    else:
        result = _ragged(mat2.T, x, sizes, ((1,), (2,)), 0, [0], x.dtype if dtype == x.dtype else None).T
    return result.astype(dtype)


@lowering(aten._trilinear.default)
def trilinear(i1, i2, i3, expand1, expand2, expand3, sumdim, unroll_dim=1):
    """The product of three tensors, each given axes at `expand`, summed over `sumdim`."""
    ndim = i1.ndim + len(expand1)
    axes = [[d for d in range(ndim) if d not in expand] for expand in (expand1, expand2, expand3)]
    kept = [d for d in range(ndim) if d not in sumdim]
    wide = accumulator(i1.dtype)
    present = [d for d in kept if any(d in a for a in axes)]
    out = jnp.einsum(i1, axes[0], i2, axes[1], i3, axes[2], present, preferred_element_type=wide)
    for d in kept:
        if d not in present:
            out = jnp.expand_dims(out, kept.index(d))
    return out
