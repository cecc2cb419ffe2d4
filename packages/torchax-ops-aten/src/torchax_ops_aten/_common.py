"""Helpers shared by the families: axes, casts with torch's rules, reduction of losses."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from torchax import convert
from torchax.dtypes import to_jax

MEAN, SUM = 1, 2  # at::Reduction; 0 is "none"


def axes(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """`dim` as non-negative axes; None and the empty list mean all of them. A 0-d array has none."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return tuple(range(ndim))
    if ndim == 0:
        return ()
    return tuple(d % ndim for d in ((dim,) if isinstance(dim, int) else dim))


def lift(x: Array, dim: int) -> tuple[Array, int]:
    """`x` with at least one axis, and `dim` as a non-negative axis of it."""
    axes = max(x.ndim, 1)
    if not -axes <= dim < axes:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-axes}, {axes - 1}], but got {dim})")
    return (x, dim % x.ndim) if x.ndim else (x.reshape(1), 0)


def is_complex(x: Array) -> bool:
    """Whether `x` is complex."""
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def is_float(x: Array) -> bool:
    """Whether `x` is real floating point."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def is_inexact(x: Array) -> bool:
    """Whether `x` is floating point or complex."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def default_float() -> np.dtype:
    """The dtype that torch gives to the quotient of integers."""
    return to_jax(torch.get_default_dtype())


def accumulator(dtype: np.dtype) -> np.dtype:
    """The dtype in which sums over `dtype` are accumulated."""
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        return np.dtype(np.float32)
    return np.dtype(dtype)


def wide(x: Array) -> Array:
    """`x` with 16-bit floats widened to float32."""
    return x.astype(accumulator(x.dtype))


def cast(x, dtype: np.dtype) -> Array:
    """`x`, an array or a number, converted to `dtype` with the results of CPU torch."""
    return convert.cast(jnp.asarray(x), np.dtype(dtype))


def interpolate(x, end, weight) -> Array:
    """x + weight (end - x), computed from the nearer end as ATen's lerp does."""
    near = jnp.abs(weight) < 0.5
    return jnp.where(near, x, end) + jnp.where(near, weight, weight - 1) * (end - x)


def complex_log_add_exp(a: Array, b: Array) -> Array:
    """log(exp(a) + exp(b)) of complex numbers: the one with the larger real part is drawn out, its phase kept."""
    swap = a.real < b.real
    top, low = jnp.where(swap, b, a), jnp.where(swap, a, b)
    return jnp.where(jnp.isinf(low.real), top, top + jnp.log1p(jnp.exp(low - top)))


def reduce_loss(loss: Array, reduction: int) -> Array:
    """Elementwise losses reduced as ``reduction`` says."""
    if reduction == MEAN:
        return jnp.mean(loss)
    return jnp.sum(loss) if reduction == SUM else loss


def spread_loss(grad: Array, numel: int, reduction: int) -> Array:
    """The gradient of each elementwise loss, from the gradient of the reduced one."""
    return grad / numel if reduction == MEAN else grad
