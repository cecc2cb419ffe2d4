"""Copies, casts and constants shaped like another tensor."""

import jax.numpy as jnp
import numpy as np
from torchax.dtypes import to_jax
from torchax.ops import aten, lowering

from ._common import cast


@lowering(
    aten.clone.default,
    aten.alias_copy.default,
    aten.detach_copy.default,
    aten.lift_fresh_copy.default,
    aten._lazy_clone.default,
)
def clone(x):
    """x itself: arrays are immutable."""
    return x


@lowering(aten.copy.default)
def copy(x, src, non_blocking=False):
    """src in the dtype and shape of x."""
    return jnp.broadcast_to(cast(src, x.dtype), x.shape)


@lowering(aten.fill.Scalar, aten.fill.Tensor)
def fill(x, value):
    """value everywhere."""
    return jnp.broadcast_to(cast(value, x.dtype), x.shape)


@lowering(aten.zero.default)
def zero(x):
    """Zeros."""
    return jnp.zeros_like(x)


def _dtype(x, dtype) -> np.dtype:
    return x.dtype if dtype is None else to_jax(dtype)


@lowering(aten.full_like.default)
def full_like(x, fill_value, *, dtype=None):
    """fill_value everywhere."""
    return jnp.broadcast_to(cast(fill_value, _dtype(x, dtype)), x.shape)


@lowering(aten.zeros_like.default, aten.empty_like.default)
def zeros_like(x, *, dtype=None):
    """Zeros (an empty tensor holds zeros, too)."""
    return jnp.zeros(x.shape, _dtype(x, dtype))


@lowering(aten.ones_like.default)
def ones_like(x, *, dtype=None):
    """Ones."""
    return jnp.ones(x.shape, _dtype(x, dtype))
