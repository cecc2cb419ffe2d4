"""gather, scatter and reductions by index."""

import jax.numpy as jnp
from torchax.ops import aten, lowering

from ._index import at_least_1d, check_range, dimension, iota, narrow, scalar
from .indexing import reduce_at


@lowering(aten.gather.default, checks=True)
def gather(x, dim, index, sparse_grad=False):
    """``out[i][j] = x[index[i][j]][j]`` for ``dim=0``; `index` may be smaller than `x` elsewhere."""
    shape, dim = index.shape, dimension(dim, x.ndim)
    x, index = at_least_1d(x), at_least_1d(index)
    if not index.size:
        return jnp.zeros(shape, x.dtype)
    check_range(index, x.shape[dim], dim, RuntimeError)
    x = x[tuple(slice(None) if d == dim else slice(0, n) for d, n in enumerate(index.shape))]
    index = narrow(index, x.shape[dim])
    return jnp.take_along_axis(x, index, dim, mode="clip", wrap_negative_indices=False).reshape(shape)


def _target(x, dim, index):
    """`x` at least 1-d, and the index expression of the elements that `index` names along `dim`."""
    dim = dimension(dim, x.ndim)
    full, index = at_least_1d(x), at_least_1d(index)
    check_range(index, full.shape[dim], dim, RuntimeError)
    at = [iota(n, index.ndim, d) for d, n in enumerate(index.shape)]
    at[dim] = narrow(index, full.shape[dim])
    return full, tuple(at), index.shape


def _source(src, shape, dtype):
    """The part of `src` that `index` (of `shape`) covers."""
    return at_least_1d(src)[tuple(slice(0, n) for n in shape)].astype(dtype)


@lowering(aten.scatter.src, checks=True)
def scatter(x, dim, index, src):
    """`x` with elements of `src` written where `index` says."""
    full, at, shape = _target(x, dim, index)
    values = _source(src, shape, x.dtype)
    return full.at[at].set(values, mode="drop", wrap_negative_indices=False).reshape(x.shape)


@lowering(aten.scatter.value, checks=True)
def scatter_value(x, dim, index, value):
    """`x` with `value` written where `index` says."""
    full, at, _ = _target(x, dim, index)
    return full.at[at].set(scalar(value, x.dtype), mode="drop", wrap_negative_indices=False).reshape(x.shape)


@lowering(aten.scatter_add.default, checks=True)
def scatter_add(x, dim, index, src):
    """`x` with elements of `src` added where `index` says."""
    return scatter_reduce(x, dim, index, src, "sum")


@lowering(aten.scatter.reduce, checks=True)
def scatter_reduce_src(x, dim, index, src, reduce):
    """The older form of `scatter_reduce`: ``add`` or ``multiply``."""
    return scatter_reduce(x, dim, index, src, reduce)


@lowering(aten.scatter.value_reduce, checks=True)
def scatter_reduce_value(x, dim, index, value, reduce):
    """The older form of `scatter_reduce` with one value."""
    full, at, _ = _target(x, dim, index)
    return reduce_at(full, at, scalar(value, x.dtype), reduce, True).reshape(x.shape)


@lowering(aten.scatter_reduce.two, checks=True)
def scatter_reduce(x, dim, index, src, reduce, include_self=True):
    """`x` with elements of `src` reduced into it where `index` says."""
    full, at, shape = _target(x, dim, index)
    return reduce_at(full, at, _source(src, shape, x.dtype), reduce, include_self).reshape(x.shape)
