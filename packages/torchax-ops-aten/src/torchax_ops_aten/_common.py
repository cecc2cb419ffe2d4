"""Helpers shared by the families: axes, casts with torch's rules, reduction of losses."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
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
    """`x` converted to `dtype` with the results of CPU torch, where C++ leaves them undefined, too.

    A float outside of the range of the integer type (and NaN) becomes the smallest int32 or int64; narrower
    integers wrap around. A complex number loses its imaginary part.
    """
    x = jnp.asarray(x)
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    if dtype == np.bool_:
        return x != 0
    if is_complex(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.real
    if is_float(x) and jnp.issubdtype(dtype, jnp.integer):
        if dtype == np.uint64:
            # 2**63 and above don't pass through int64; negative numbers wrap around.
            return jnp.where(x < 0, _to_int(x, np.dtype(np.int64)).astype(dtype), x.astype(dtype))
        via = np.dtype(np.int64 if dtype.itemsize == 8 or dtype == np.uint32 else np.int32)
        return _to_int(x, via).astype(dtype)
    return x.astype(dtype)


def _to_int(x: Array, dtype: np.dtype) -> Array:
    info = np.iinfo(dtype)
    x = wide(x)
    inside = (x >= float(info.min)) & (x < -float(info.min))
    return jnp.where(inside, x, 0).astype(dtype) + jnp.where(inside, 0, info.min).astype(dtype)


def reduce_loss(loss: Array, reduction: int) -> Array:
    """Elementwise losses reduced as ``reduction`` says."""
    if reduction == MEAN:
        return jnp.mean(loss)
    return jnp.sum(loss) if reduction == SUM else loss


def spread_loss(grad: Array, numel: int, reduction: int) -> Array:
    """The gradient of each elementwise loss, from the gradient of the reduced one."""
    return grad / numel if reduction == MEAN else grad
