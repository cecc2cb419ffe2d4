"""Comparisons, logical and bitwise operations."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering, table


def _truth(fn):
    return lambda *xs: fn(*(x.astype(np.bool_) for x in xs))


# "keep": CPU torch compares in the common dtype, so a number is rounded to bfloat16 before it is compared with one.
COMPARISONS = table(
    {
        "eq": jnp.equal, "ne": jnp.not_equal, "lt": jnp.less, "le": jnp.less_equal, "gt": jnp.greater,
        "ge": jnp.greater_equal,
    },
    overloads=("Tensor", "Scalar"),
    promote="keep",
)  # fmt: skip
LOGICAL = table(
    {
        "logical_and": _truth(jnp.logical_and), "logical_or": _truth(jnp.logical_or),
        "logical_xor": _truth(jnp.logical_xor), "logical_not": _truth(jnp.logical_not),
    }
)  # fmt: skip
BITWISE = table(
    {"bitwise_and": jnp.bitwise_and, "bitwise_or": jnp.bitwise_or, "bitwise_xor": jnp.bitwise_xor},
    overloads=("Tensor", "Scalar", "Scalar_Tensor"),
    promote="keep",
)
NEGATION = table({"bitwise_not": jnp.bitwise_not}, promote="keep")


def _shift(x, other):
    """Both operands as arrays of one shape and dtype."""
    dtype = jnp.result_type(x, other)
    return jnp.broadcast_arrays(jnp.asarray(x, dtype), jnp.asarray(other, dtype))


@lowering(
    aten.bitwise_left_shift.Tensor, aten.bitwise_left_shift.Tensor_Scalar, aten.bitwise_left_shift.Scalar_Tensor,
    aten.__lshift__.Tensor, aten.__lshift__.Scalar, promote="keep",
)  # fmt: skip
def left_shift(x, other):
    """x << other; 0 where other is negative or at least the number of bits."""
    x, other = _shift(x, other)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x * jnp.exp2(other)
    return jnp.where((other < 0) | (other >= 8 * x.dtype.itemsize), 0, lax.shift_left(x, other)).astype(x.dtype)


@lowering(
    aten.bitwise_right_shift.Tensor, aten.bitwise_right_shift.Tensor_Scalar, aten.bitwise_right_shift.Scalar_Tensor,
    aten.__rshift__.Tensor, aten.__rshift__.Scalar, promote="keep",
)  # fmt: skip
def right_shift(x, other):
    """x >> other, arithmetic; too large and negative shifts leave the sign."""
    x, other = _shift(x, other)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x / jnp.exp2(other)
    bits = 8 * x.dtype.itemsize
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return jnp.where(other >= bits, 0, lax.shift_right_logical(x, other)).astype(x.dtype)
    other = jnp.where((other < 0) | (other >= bits), bits - 1, other)
    return lax.shift_right_arithmetic(x, other)
