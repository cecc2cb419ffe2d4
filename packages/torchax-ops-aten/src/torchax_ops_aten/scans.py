"""Cumulative sums, products, extrema and logsumexp along a dimension."""

import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torchax.dtypes import to_jax
from torchax.ops import aten, lowering

from ._common import cast, complex_log_add_exp, is_complex, is_inexact, lift, wide


def _scan(fn, x, dim, dtype):
    if dtype is not None and dtype != torch.bool:
        x = cast(x, to_jax(dtype))
    elif not is_inexact(x):
        x = x.astype(np.int64)
    x = wide(x)
    y, dim = lift(x, dim)
    return fn(y, axis=dim).reshape(x.shape) if y.size else x


@lowering(aten.cumsum.default)
def cumsum(x, dim, *, dtype=None):
    """The sums of the elements up to each one."""
    return _scan(lax.cumsum, x, dim, dtype)


@lowering(aten.cumprod.default)
def cumprod(x, dim, *, dtype=None):
    """The products of the elements up to each one."""
    return _scan(lax.cumprod, x, dim, dtype)


@lowering(aten.logcumsumexp.default, aten._logcumsumexp.default)
def logcumsumexp(x, dim):
    """log(cumsum(exp(x))), without overflow."""
    y, dim = lift(wide(x), dim)
    if y.size == 0:
        return x
    if is_complex(y):
        return lax.associative_scan(complex_log_add_exp, y, axis=dim).reshape(x.shape)
    return lax.cumlogsumexp(y, axis=dim).reshape(x.shape)


def _extrema(x, dim, wins):
    """Running extrema and the index of the last element that reached them; NaN wins over everything."""
    y, dim = lift(x, dim)
    index = lax.broadcasted_iota(np.int32, y.shape, dim)
    if y.size == 0:
        return x, index

    def later(a, b):
        take = wins(b[0], a[0])
        if is_inexact(y):
            take = (take & ~jnp.isnan(a[0])) | jnp.isnan(b[0])
        return jnp.where(take, b[0], a[0]), jnp.where(take, b[1], a[1])

    values, index = lax.associative_scan(later, (y, index), axis=dim)
    return values.reshape(x.shape), index.reshape(x.shape)


@lowering(aten.cummax.default)
def cummax(x, dim):
    """Running maxima and their indices."""
    return _extrema(x, dim, jnp.greater_equal)


@lowering(aten.cummin.default)
def cummin(x, dim):
    """Running minima and their indices."""
    return _extrema(x, dim, jnp.less_equal)
