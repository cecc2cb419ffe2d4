"""Matrix products of 8-bit operands: int8, weights of int8, 8-bit floats with scales."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.dtypes import to_jax, to_torch
from torchax.errors import InvalidOperands
from torchax.ops import aten, lowering

from ._common import accumulator, wide

# XLA converts an 8-bit operand while it reads it for the product: no wider copy of the weights is ever held.


@lowering(aten._int_mm.default)
def int_mm(a, b):
    """int8 matrices, accumulated in int32."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=np.dtype(np.int32))


@lowering(aten._weight_int8pack_mm.default)
def weight_int8pack_mm(x, mat2, scales):
    """x mat2^T with int8 weights [N, K] and a scale for each of the N results."""
    if scales.dtype != x.dtype:
        raise InvalidOperands(
            f"_weight_int8pack_mm: expected scales of the dtype of self, {to_torch(x.dtype)}, but got "
            f"{to_torch(scales.dtype)}; convert them with .to(...)"
        )
    dtype = accumulator(x.dtype)
    product = lax.dot_general(x.astype(dtype), mat2.astype(dtype), (((1,), (1,)), ((), ())))
    return (product * scales.astype(dtype)).astype(x.dtype)


# torch's meta kernels of the following want sizes and strides that only CUDA needs.
@lowering(aten._scaled_mm.default, meta=False)
def scaled_mm(x, mat2, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    """(scale_a x) (scale_b mat2) + bias of 8-bit floats; scales are numbers, or one for each row and each column.

    `scale_result` divides results that `out_dtype` asks for as 8-bit floats; others ignore it, as on CPU.
    """
    _check_product(x, mat2, bias)
    single = scale_a.size == scale_b.size == 1
    if not (single or _one_for_each(x, mat2, scale_a, scale_b)) or not _scales_fit(x, mat2, scale_a, scale_b):
        raise ValueError(_about_scales(x, mat2, scale_a, scale_b))
    if scale_result is not None and (scale_result.size != 1 or scale_result.dtype != np.float32):
        raise RuntimeError("scale_result must be a float scalar")
    dtype = x.dtype if out_dtype is None else to_jax(out_dtype)
    result = _scaled_product(x, mat2, scale_a, scale_b, bias)
    if scale_result is not None and out_dtype is not None and _is_float8(dtype):
        result = result / scale_result.reshape(())
    return result.astype(dtype)


TENSORWISE, ROWWISE = 0, 1  # torch.nn.functional.ScalingType; those that CPU torch has


@lowering(aten._scaled_mm_v2.default, meta=False)
def scaled_mm_v2(
    x,
    mat2,
    scale_a,
    recipe_a,
    swizzle_a,
    scale_b,
    recipe_b,
    swizzle_b,
    bias,
    out_dtype,
    contraction_dim=(),
    use_fast_accum=False,
):
    """As `scaled_mm`, with lists of scales and what each is for: the whole operand, or its rows and columns."""
    if any(swizzle_a) or any(swizzle_b):
        raise ValueError("_scaled_mm_v2 does not support swizzled scales here; pass NO_SWIZZLE")
    if list(contraction_dim) not in ([], [1, 0]):
        raise ValueError(
            f"_scaled_mm_v2 contracts dimension 1 of self with 0 of mat2, contraction_dim is {contraction_dim}"
        )
    _check_product(x, mat2, bias)
    recipes = (list(recipe_a), list(recipe_b))
    if recipes not in (([TENSORWISE],) * 2, ([ROWWISE],) * 2) or not len(scale_a) == len(scale_b) == 1:
        raise ValueError(
            "Invalid scaling configuration: one scale for each operand, TensorWise or RowWise for both, is supported here"
        )
    (a,), (b,) = scale_a, scale_b
    fits = _one_for_each(x, mat2, a, b) if recipes[0] == [ROWWISE] else a.size == b.size == 1
    if not fits or not _scales_fit(x, mat2, a, b):
        raise ValueError(_about_scales(x, mat2, a, b))
    dtype = x.dtype if out_dtype is None else to_jax(out_dtype)
    return _scaled_product(x, mat2, a, b, bias).astype(dtype)


def _scaled_product(x, mat2, scale_a, scale_b, bias):
    if scale_a.size == scale_b.size == 1:
        scale_a, scale_b = scale_a.reshape(()), scale_b.reshape(())
    product = jnp.matmul(wide(x), wide(mat2)) * scale_a * scale_b
    return product if bias is None else product + bias.astype(np.float32)


def _is_float8(dtype):
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize == 1


def _check_product(x, mat2, bias):
    for name, t in (("mat1", x), ("mat2", mat2)):
        if t.ndim != 2:
            raise RuntimeError(f"{name} must be a matrix, it has {t.ndim} dimensions")
    if x.shape[1] != mat2.shape[0]:
        a, b = ("x".join(map(str, t.shape)) for t in (x, mat2))
        raise RuntimeError(f"mat_a and mat_b shapes cannot be multiplied ({a} and {b})")
    if bias is not None and bias.size != mat2.shape[1]:
        raise RuntimeError(f"Bias must be size {mat2.shape[1]} but got {bias.size}")


def _one_for_each(x, mat2, scale_a, scale_b):
    return scale_a.shape == (x.shape[0], 1) and scale_b.shape == (1, mat2.shape[1])


def _scales_fit(x, mat2, scale_a, scale_b):
    return _is_float8(x.dtype) and _is_float8(mat2.dtype) and scale_a.dtype == scale_b.dtype == np.float32


def _about_scales(x, mat2, scale_a, scale_b):
    given = ", ".join(f"{to_torch(t.dtype)} {t.shape}" for t in (x, mat2, scale_a, scale_b))
    return (
        "Invalid scaling configuration: operands must be 8-bit floats, scales float32, one number for each operand, or "
        f"({x.shape[0]}, 1) and (1, {mat2.shape[1]}); they are {given}"
    )
