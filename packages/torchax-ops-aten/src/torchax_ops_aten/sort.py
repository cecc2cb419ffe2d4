"""Order statistics: sort, topk, kthvalue, median, mode. NaN counts as the largest value, as in torch."""

import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering

from ._index import at_least_1d, dimension, iota


def _sorted(x, dim, descending=False):
    """Values and int32 indices in stable order."""
    index = jnp.broadcast_to(iota(x.shape[dim], x.ndim, dim), x.shape)
    if descending:  # reversed before and after, equal elements keep their order
        x, index = lax.rev(x, (dim,)), lax.rev(index, (dim,))
    values, index = lax.sort((x, index), dimension=dim, is_stable=True, num_keys=1)
    return (lax.rev(values, (dim,)), lax.rev(index, (dim,))) if descending else (values, index)


@lowering(aten.sort.default)
def sort(x, dim=-1, descending=False):
    """Sorted values and where they were."""
    values, index = _sorted(at_least_1d(x), dimension(dim, x.ndim), descending)
    return values.reshape(x.shape), index.reshape(x.shape)


@lowering(aten.sort.stable)
def sort_stable(x, *, stable=None, dim=-1, descending=False):
    """Sorted values and where they were; always stable here."""
    return sort(x, dim, descending)


def _order_key(x):
    """Signed integers in the order of `x` with NaN largest, for floats."""
    bits = jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, x.dtype), jnp.where(x == 0, jnp.zeros((), x.dtype), x))
    bits = lax.bitcast_convert_type(bits, {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[x.dtype.itemsize])
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


@lowering(aten.topk.default)
def topk(x, k, dim=-1, largest=True, sorted=True):
    """The `k` largest (smallest) values and where they were."""
    shape, dim = x.shape, dimension(dim, x.ndim)
    x = jnp.moveaxis(at_least_1d(x), dim, -1)
    if k == 0 or not x.size:
        empty = jnp.zeros((*x.shape[:-1], k), x.dtype)
        return jnp.moveaxis(empty, -1, dim), jnp.moveaxis(empty.astype(jnp.int32), -1, dim)
    key = x
    if jnp.issubdtype(x.dtype, jnp.floating):
        key = _order_key(x) if not largest else jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, x.dtype), x)
    elif x.dtype == jnp.bool_:
        key = x.astype(jnp.int8)
    values, index = lax.top_k(key if largest else ~key, k)
    if not largest or x.dtype == jnp.bool_:
        values = jnp.take_along_axis(x, index, -1, mode="clip", wrap_negative_indices=False)
    if not shape:
        return values.reshape(()), index.reshape(())
    return jnp.moveaxis(values, -1, dim), jnp.moveaxis(index, -1, dim)


def _kept(found, shape, dim, keepdim):
    """Values and indices of one element a row, `dim` kept as 1 or dropped."""
    values, index = found
    if shape and not keepdim:
        return jnp.squeeze(values, dim), jnp.squeeze(index, dim)
    return (values, index) if shape else (values.reshape(()), index.reshape(()))


@lowering(aten.kthvalue.default)
def kthvalue(x, k, dim=-1, keepdim=False):
    """The `k`-th smallest value and where it was."""
    dim = dimension(dim, x.ndim)
    values, index = _sorted(at_least_1d(x), dim)
    at = slice(k - 1, k)
    if not values.size:  # nothing to choose from, or a dimension beside of no elements
        at = slice(0, 1)
    return _kept((lax.slice_in_dim(a, at.start, at.stop, axis=dim) for a in (values, index)), x.shape, dim, keepdim)


def _middle(x, dim, ignore_nan):
    """The lower median and where it was; the first NaN wins unless `ignore_nan`."""
    values, index = _sorted(x, dim)
    n = x.shape[dim]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return tuple(lax.slice_in_dim(a, (n - 1) // 2, (n - 1) // 2 + 1, axis=dim) for a in (values, index))
    count = jnp.sum(~jnp.isnan(values), dim, keepdims=True, dtype=jnp.int32)
    at = jnp.maximum(count - 1, 0) // 2
    if not ignore_nan:
        at = jnp.where(count < n, count, at)
    return tuple(jnp.take_along_axis(a, at, dim, mode="clip") for a in (values, index))


@lowering(aten.median.dim)
def median_dim(x, dim, keepdim=False):
    """The lower median along `dim` and where it was."""
    dim = dimension(dim, x.ndim)
    return _kept(_middle(at_least_1d(x), dim, False), x.shape, dim, keepdim)


@lowering(aten.nanmedian.dim)
def nanmedian_dim(x, dim, keepdim=False):
    """The lower median of what is not NaN along `dim` and where it was."""
    dim = dimension(dim, x.ndim)
    return _kept(_middle(at_least_1d(x), dim, True), x.shape, dim, keepdim)


def _none_of(x):
    """What the median of nothing is."""
    return jnp.full((), jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min, x.dtype)


@lowering(aten.median.default)
def median(x):
    """The lower median of all elements."""
    return _middle(x.reshape(-1), 0, False)[0].reshape(()) if x.size else _none_of(x)


@lowering(aten.nanmedian.default)
def nanmedian(x):
    """The lower median of all elements that are not NaN."""
    return _middle(x.reshape(-1), 0, True)[0].reshape(()) if x.size else _none_of(x)


@lowering(aten.mode.default)
def mode(x, dim=-1, keepdim=False):
    """The most frequent value (the smallest of equally frequent ones) and the last place where it was."""
    dim = dimension(dim, x.ndim)
    full = jnp.moveaxis(at_least_1d(x), dim, -1)
    if not full.size:
        none = jnp.zeros((*full.shape[:-1], 1), full.dtype)
        return _kept((jnp.moveaxis(a, -1, dim) for a in (none, none.astype(jnp.int32))), x.shape, dim, keepdim)
    values, index = _sorted(full, full.ndim - 1)
    n = full.shape[-1]
    at = iota(n, full.ndim, full.ndim - 1)
    first = jnp.concatenate([jnp.ones_like(values[..., :1], bool), values[..., 1:] != values[..., :-1]], -1)
    begin = lax.cummax(jnp.where(first, at, 0), values.ndim - 1)
    best = jnp.argmax(at - begin, -1, keepdims=True).astype(jnp.int32)  # the first of the longest runs
    picked = (jnp.take_along_axis(a, best, -1, mode="clip") for a in (values, index))
    return _kept((jnp.moveaxis(a, -1, dim) for a in picked), x.shape, dim, keepdim)
