"""Binary search in sorted values, and histograms."""

import math

import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering

from ._index import narrow, scalar


def _search(sequence, values, right):
    """Where each of `values` goes in the last dimension of `sequence` (1-d, or batched alike).

    torch's comparisons are kept, so that NaN and unsorted sequences give what they give there.
    """
    n = sequence.shape[-1]
    if not n or not values.size:
        return jnp.zeros(values.shape, jnp.int32)

    def step(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        if sequence.ndim == 1:
            found = sequence.at[middle].get(mode="clip", wrap_negative_indices=False)
        else:
            found = jnp.take_along_axis(sequence, middle, -1, mode="clip", wrap_negative_indices=False)
        beyond = ~(found > values) if right else ~(found >= values)
        searching = low < high
        return jnp.where(searching & beyond, middle + 1, low), jnp.where(searching & ~beyond, middle, high)

    start = jnp.zeros(values.shape, jnp.int32), jnp.full(values.shape, n, jnp.int32)
    return lax.fori_loop(0, n.bit_length(), step, start)[0]


@lowering(aten.searchsorted.Tensor)
def searchsorted(sorted_sequence, values, *, out_int32=False, right=False, side=None, sorter=None):
    """Where each value goes so that the sequence stays sorted."""
    if sorter is not None:
        sorter = narrow(sorter, sorted_sequence.shape[-1])
        sorted_sequence = jnp.take_along_axis(sorted_sequence, sorter, -1, mode="clip")
    dtype = jnp.result_type(sorted_sequence, values)
    return _search(sorted_sequence.astype(dtype), values.astype(dtype), right or side == "right")


@lowering(aten.searchsorted.Scalar)
def searchsorted_scalar(sorted_sequence, value, *, out_int32=False, right=False, side=None, sorter=None):
    """Where a number goes so that the sequence stays sorted."""
    value = jnp.asarray(value)
    integers = jnp.issubdtype(sorted_sequence.dtype, jnp.integer)
    if not (integers and jnp.issubdtype(value.dtype, jnp.floating)):
        value = value.astype(sorted_sequence.dtype)
    return searchsorted(sorted_sequence, value, right=right, side=side, sorter=sorter)


@lowering(aten.bucketize.Tensor)
def bucketize(x, boundaries, *, out_int32=False, right=False):
    """The bucket between `boundaries` in which each element falls."""
    return searchsorted(boundaries, x, right=right)


@lowering(aten.bucketize.Scalar)
def bucketize_scalar(x, boundaries, *, out_int32=False, right=False):
    """The bucket between `boundaries` in which a number falls."""
    return searchsorted_scalar(boundaries, x, right=right)


def _outer(low, high, margin):
    """Bounds that enclose something: equal ones are moved apart by `margin` each."""
    apart = jnp.where(low == high, jnp.full_like(low, margin), jnp.zeros_like(low))
    return low - apart, high + apart


@lowering(aten.histc.default)
def histc(x, bins=100, min=0, max=0):
    """Number of elements in `bins` equal intervals of [min, max], by default those of the values."""
    work = jnp.result_type(x.dtype, jnp.float32)
    flat = x.reshape(-1).astype(work)
    low, high = scalar(min, work), scalar(max, work)
    if flat.size:
        given = low != high
        low, high = jnp.where(given, low, flat.min()), jnp.where(given, high, flat.max())
    low, high = _outer(low, high, 1)
    at = ((flat - low) * bins / (high - low)).astype(jnp.int32)
    inside = (flat >= low) & (flat <= high)
    at = jnp.where(inside, jnp.minimum(at, bins - 1), bins)
    counts = jnp.zeros((bins,), jnp.int32 if flat.size < 2**31 else jnp.int64).at[at].add(1, mode="drop")
    return counts.astype(x.dtype)


def _edges(values, bins, low, high):
    """``bins + 1`` evenly spaced edges from `low` to `high`, computed from the nearer end."""
    step = (high - low) / bins
    i = jnp.arange(bins + 1, dtype=jnp.int32)
    up, down = low + step * i.astype(values.dtype), high - step * (bins - i).astype(values.dtype)
    return jnp.where(i < (bins + 1) // 2, up, down)


def _all_edges(x, bins, limits):
    """Edges for each column of `x`, between the given limits or the column's extremes."""
    columns = x.reshape(-1, x.shape[-1])
    if len(bins) != x.shape[-1]:
        raise ValueError("one number of bins for each column")
    edges = []
    for d, count in enumerate(bins):
        if limits:
            low, high = scalar(limits[2 * d], x.dtype), scalar(limits[2 * d + 1], x.dtype)
        elif columns.size:
            low, high = columns[:, d].min(), columns[:, d].max()
        else:
            low, high = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
        edges.append(_edges(x, count, *_outer(low, high, 0.5)))
    return edges


def _histogram(x, edges, weight, density):
    """Sums of weights (or numbers) of the rows of `x` in the boxes between `edges`."""
    columns = x.reshape(-1, x.shape[-1])
    shape = tuple(e.size - 1 for e in edges)
    at, inside = jnp.zeros((columns.shape[0],), jnp.int32), jnp.ones((columns.shape[0],), bool)
    for d, edge in enumerate(edges):
        value = columns[:, d]
        box = jnp.clip(_search(edge, value, True) - 1, 0, shape[d] - 1)
        inside &= (value >= edge[0]) & (value <= edge[-1])
        at = at * shape[d] + box
    weight = jnp.ones((), x.dtype) if weight is None else weight.reshape(-1).astype(x.dtype)
    total = jnp.zeros((math.prod(shape),), x.dtype).at[jnp.where(inside, at, math.prod(shape))].add(weight, mode="drop")
    total = total.reshape(shape)
    if density:
        total = total / total.sum()
        for d, edge in enumerate(edges):
            total = total / jnp.diff(edge).reshape([-1 if i == d else 1 for i in range(len(edges))])
    return total


@lowering(aten.histogram.bin_ct)
def histogram(x, bins=100, *, range=None, weight=None, density=False):
    """Histogram over equal intervals, and their edges."""
    flat = x.reshape(-1, 1)
    edges = _all_edges(flat, [bins], range)
    return _histogram(flat, edges, weight, density), edges[0]


@lowering(aten.histogram.bins_tensor)
def histogram_bins(x, bins, *, weight=None, density=False):
    """Histogram over given intervals, and their edges."""
    return _histogram(x.reshape(-1, 1), [bins], weight, density), bins


@lowering(aten._histogramdd_bin_edges.default)
def histogramdd_bin_edges(x, bins, *, range=None, weight=None, density=False):
    """Edges of equal intervals for each column."""
    return _all_edges(x, bins, range)


@lowering(aten._histogramdd_from_bin_cts.default)
def histogramdd_from_bin_cts(x, bins, *, range=None, weight=None, density=False):
    """Histogram of rows over boxes of equal size."""
    return _histogram(x, _all_edges(x, bins, range), weight, density)


@lowering(aten._histogramdd_from_bin_tensors.default)
def histogramdd_from_bin_tensors(x, bins, *, weight=None, density=False):
    """Histogram of rows over given boxes."""
    return _histogram(x, bins, weight, density)
