"""Ops whose result has as many elements as the values say: unique and bincount. They run on the host."""

import jax.numpy as jnp
import numpy as np
from torchax.ops import aten, lowering

from ._index import is_half


def _host(x):
    """Values in NumPy; half-width floats in float32, which sorts them alike."""
    values = np.asarray(x)
    return values.astype(np.float32) if is_half(values.dtype) else values


def _results(values, dtype, inverse, counts, return_inverse, return_counts):
    none = np.zeros((0,), np.int64)
    return (
        values.astype(dtype),
        (inverse if return_inverse else none).astype(np.int64),
        (counts if return_counts else none).astype(np.int64),
    )


@lowering(aten._unique2.default, kind="dynamic")
def unique(x, sorted=True, return_inverse=False, return_counts=False):
    """Different values, sorted; which of them each element is; how many of each there are. NaN differs from NaN."""
    host = _host(x)
    values, inverse, counts = np.unique(host, return_inverse=True, return_counts=True, equal_nan=False)
    return _results(values, x.dtype, inverse.reshape(x.shape), counts, return_inverse, return_counts)


@lowering(aten._unique.default, kind="dynamic")
def unique_inverse(x, sorted=True, return_inverse=False):
    """Different values, sorted; which of them each element is."""
    return unique(x, sorted, return_inverse)[:2]


@lowering(aten.unique_dim.default, kind="dynamic")
def unique_dim(x, dim, sorted=True, return_inverse=False, return_counts=False):
    """Different slices along `dim`, in lexicographic order."""
    if not x.size:
        return _no_slices(x, dim)
    values, inverse, counts = np.unique(_host(x), return_inverse=True, return_counts=True, axis=dim)
    return _results(values, x.dtype, inverse.reshape(-1), counts, return_inverse, return_counts)


def _no_slices(x, dim):
    none = jnp.zeros((0,), jnp.int64)
    return jnp.zeros(x.shape, x.dtype), none, none


def _runs(rows):
    """For ``(n, elements)``: which rows begin a run, the run of each row, the length of each run."""
    first = np.ones((rows.shape[0],), bool)
    first[1:] = (rows[1:] != rows[:-1]).any(1)
    starts = np.flatnonzero(first)
    return starts, np.cumsum(first) - 1, np.diff(np.append(starts, rows.shape[0]))


@lowering(aten.unique_consecutive.default, kind="dynamic")
def unique_consecutive(x, return_inverse=False, return_counts=False, dim=None):
    """One element (slice along `dim`) of each run of equal ones."""
    if dim is not None:
        return unique_dim_consecutive(x, dim, return_inverse, return_counts)
    flat = _host(x).reshape(-1)
    starts, inverse, counts = _runs(flat[:, None])
    return _results(flat[starts], x.dtype, inverse.reshape(x.shape), counts, return_inverse, return_counts)


@lowering(aten.unique_dim_consecutive.default, kind="dynamic")
def unique_dim_consecutive(x, dim, return_inverse=False, return_counts=False):
    """One slice along `dim` of each run of equal ones."""
    if not x.size:
        return _no_slices(x, dim)
    rows = np.moveaxis(_host(x), dim, 0)
    starts, inverse, counts = _runs(rows.reshape(rows.shape[0], -1))
    values = np.moveaxis(rows[starts], 0, dim)
    return _results(values, x.dtype, inverse, counts, return_inverse, return_counts)


@lowering(aten.bincount.default, kind="dynamic")
def bincount(x, weights=None, minlength=0):
    """How often each of 0, 1, 2, ... occurs, or the sum of its weights."""
    if not x.size:
        return jnp.zeros((minlength,), jnp.int64 if weights is None else _weight_dtype(weights))
    if int(jnp.min(x)) < 0:
        raise RuntimeError("bincount only supports 1-d non-negative integral inputs.")
    length = max(int(jnp.max(x)) + 1, minlength)
    if weights is None:
        return jnp.zeros((length,), jnp.int64).at[x].add(1)
    weights = weights.astype(_weight_dtype(weights))
    return jnp.zeros((length,), weights.dtype).at[x].add(weights)


def _weight_dtype(weights):
    return np.float32 if weights.dtype == np.float32 else np.float64
