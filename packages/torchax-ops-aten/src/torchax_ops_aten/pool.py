"""Maximum and average pooling over windows, and their gradients."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering, raise_if

from .norm import wide

# Up to so many elements a window is read as that many strided slices, which XLA fuses; beyond, by reduce_window or scatter.
_UNROLL = 32


def tuples(values: int | Sequence[int], rank: int, default: Sequence[int] = ()) -> tuple[int, ...]:
    """`values` as one number for each of `rank` dimensions."""
    if isinstance(values, int):
        return (values,) * rank
    values = tuple(values) or tuple(default)
    return values * rank if len(values) == 1 else values


def pooled_size(n: int, k: int, s: int, p: int, d: int, ceil_mode: bool) -> int:
    """Number of windows: the last one must begin inside the input or its left padding."""
    reach = n + 2 * p - d * (k - 1) - 1
    out = (reach + (s - 1 if ceil_mode else 0)) // s + 1
    return out - 1 if ceil_mode and (out - 1) * s >= n + p else out


def _low(dtype):
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _window_pads(spatial, out, kernel, stride, padding, dilation):
    """What to add (or, negative, to crop) behind each dimension so that exactly `out` windows fit."""
    return [
        (o - 1) * s + d * (k - 1) + 1 - p - n
        for n, o, k, s, p, d in zip(spatial, out, kernel, stride, padding, dilation, strict=True)
    ]


def _positions(spatial, out, kernel_index, stride, padding, dilation):
    """Linear index in the unpadded input of element `kernel_index` of every window, int32 of shape `out`."""
    total = jnp.zeros(out, jnp.int32)
    for axis, (n, k, s, p, d) in enumerate(zip(spatial, kernel_index, stride, padding, dilation, strict=True)):
        where = lax.broadcasted_iota(jnp.int32, out, axis) * s + (k * d - p)
        total = total * n + where
    return total


def _max_pool(x, kernel, stride, padding, dilation, ceil_mode):
    """Maxima and their linear indices in ``[..., *spatial]``; the first of equal ones, the last NaN, as torch."""
    rank = len(kernel)
    spatial = x.shape[-rank:]
    out = tuple(pooled_size(*g, ceil_mode) for g in zip(spatial, kernel, stride, padding, dilation, strict=True))
    behind = _window_pads(spatial, out, kernel, stride, padding, dilation)
    if 0 in x.shape or 0 in out:
        shape = (*x.shape[:-rank], *out)
        return jnp.zeros(shape, x.dtype), jnp.zeros(shape, jnp.int32)
    config = [(0, 0, 0)] * (x.ndim - rank) + [(p, b, 0) for p, b in zip(padding, behind, strict=True)]
    padded = lax.pad(x, jnp.asarray(_low(x.dtype), x.dtype), config)
    if math.prod(kernel) > _UNROLL:
        return _max_pool_wide(padded, x, out, kernel, stride, padding, dilation)
    best: Any = None
    best_at: Any = None
    for index in itertools.product(*(range(k) for k in kernel)):
        value = _window_element(padded, index, out, stride, dilation)
        at = jnp.broadcast_to(_positions(spatial, out, index, stride, padding, dilation), value.shape)
        if best is None:
            # the index of a window of minus infinities is its first element inside the input
            best, best_at = (
                value,
                jnp.broadcast_to(_first_inside(spatial, out, kernel, stride, padding, dilation), value.shape),
            )
            newer = jnp.isnan(value) if jnp.issubdtype(x.dtype, jnp.floating) else None
            best_at = best_at if newer is None else jnp.where(newer, at, best_at)
            continue
        newer = value > best
        if jnp.issubdtype(x.dtype, jnp.floating):
            newer |= jnp.isnan(value)
        best, best_at = jnp.where(newer, value, best), jnp.where(newer, at, best_at)
    return best, best_at


def _window_element(padded, index, out, stride, dilation):
    """Element `index` of every window, by strided slices."""
    rank = len(index)
    starts = [k * d for k, d in zip(index, dilation, strict=True)]
    lead = padded.ndim - rank
    limits = [a + (o - 1) * s + 1 for a, o, s in zip(starts, out, stride, strict=True)]
    return lax.slice(padded, [0] * lead + starts, [*padded.shape[:lead], *limits], [1] * lead + list(stride))


def _first_inside(spatial, out, kernel, stride, padding, dilation):
    total = jnp.zeros(out, jnp.int32)
    for axis, (n, s, p, d) in enumerate(zip(spatial, stride, padding, dilation, strict=True)):
        start = lax.broadcasted_iota(jnp.int32, out, axis) * s - p
        # the first of start, start + d, ... that is not negative
        total = total * n + jnp.where(start < 0, start + (-start + d - 1) // d * d, start)
    return total


def _max_pool_wide(padded, x, out, kernel, stride, padding, dilation):
    """`_max_pool` for large windows: one reduction over pairs of value and index."""
    rank = len(kernel)
    lead = x.ndim - rank
    spatial = x.shape[-rank:]
    at = lax.broadcasted_iota(jnp.int32, (math.prod(spatial),), 0).reshape((1,) * lead + spatial)
    behind = _window_pads(spatial, out, kernel, stride, padding, dilation)
    outside = jnp.iinfo(jnp.int32).max
    at = lax.pad(at, jnp.int32(outside), [(0, 0, 0)] * lead + [(p, b, 0) for p, b in zip(padding, behind, strict=True)])
    at = jnp.broadcast_to(at, padded.shape)
    floating = jnp.issubdtype(x.dtype, jnp.floating)

    def better(a, b):
        (va, ia), (vb, ib) = a, b
        take = (vb > va) | ((vb == va) & (ib < ia))
        if floating:
            nan_a, nan_b = va != va, vb != vb
            take = jnp.where(nan_a | nan_b, nan_b & (~nan_a | (ib > ia)), take)
        return lax.select(take, vb, va), lax.select(take, ib, ia)

    ones = (1,) * lead
    values, indices = lax.reduce_window(
        (padded, at), (jnp.asarray(_low(x.dtype), x.dtype), jnp.int32(outside)), better,
        (*ones, *kernel), (*ones, *stride), "VALID", window_dilation=(*ones, *dilation),
    )  # fmt: skip
    return values, indices


def _unpool_gradient(grad, indices, shape, kernel, stride, padding, dilation):
    """Add each window's gradient to the element that was its maximum."""
    rank = len(kernel)
    spatial, out = shape[-rank:], grad.shape[-rank:]
    if 0 in shape or 0 in grad.shape:
        return jnp.zeros(shape, grad.dtype)
    if math.prod(kernel) > _UNROLL:
        return scatter_planes(wide(grad), indices, shape, rank)
    grad, indices = wide(grad), indices.astype(jnp.int32)
    total = None
    for index in itertools.product(*(range(k) for k in kernel)):
        hit = indices == _positions(spatial, out, index, stride, padding, dilation)
        inside = [
            _inside(n, o, k, s, p, d)
            for n, o, k, s, p, d in zip(spatial, out, index, stride, padding, dilation, strict=True)
        ]
        for axis, mask in enumerate(inside):
            if not mask.all():
                hit &= jnp.asarray(mask).reshape([-1 if i == axis else 1 for i in range(rank)])
        part = jnp.where(hit, grad, 0)
        # put element `index` of each window back to where it was read: the transpose of a strided slice
        config = [(0, 0, 0)] * (grad.ndim - rank)
        for n, o, k, s, p, d in zip(spatial, out, index, stride, padding, dilation, strict=True):
            begin = k * d - p
            config.append((begin, n - begin - ((o - 1) * s + 1), s - 1))
        part = lax.pad(part, jnp.zeros((), part.dtype), config)
        total = part if total is None else total + part
    return total


def _inside(n, out, k, s, p, d):
    at = np.arange(out) * s + k * d - p
    return (at >= 0) & (at < n)


def scatter_planes(values, indices, shape, rank):
    """Add `values` at linear `indices` of the last `rank` dimensions of zeros of `shape`."""
    plane = math.prod(shape[-rank:])
    lead = math.prod(shape[:-rank])
    if not values.size:
        return jnp.zeros(shape, values.dtype)
    flat = jnp.zeros((lead, plane), values.dtype)
    rows = lax.broadcasted_iota(jnp.int32, (lead, 1), 0)
    flat = flat.at[rows, indices.reshape(lead, -1).astype(jnp.int32)].add(values.reshape(lead, -1))
    return flat.reshape(shape)


def _max_geometry(rank, kernel_size, stride, padding, dilation):
    kernel = tuples(kernel_size, rank)
    return kernel, tuples(stride, rank, kernel), tuples(padding, rank), tuples(dilation, rank)


@lowering(aten.max_pool2d_with_indices.default)
def max_pool2d_with_indices(self, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    """Maxima of windows and their indices in each plane."""
    return _max_pool(self, *_max_geometry(2, kernel_size, stride, padding, dilation), ceil_mode)


@lowering(aten.max_pool3d_with_indices.default)
def max_pool3d_with_indices(self, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    """Maxima of windows and their indices in each volume."""
    return _max_pool(self, *_max_geometry(3, kernel_size, stride, padding, dilation), ceil_mode)


@lowering(aten.max_pool2d_with_indices_backward.default)
def max_pool2d_with_indices_backward(grad_output, self, kernel_size, stride, padding, dilation, ceil_mode, indices):
    """Gradient of `max_pool2d_with_indices`."""
    return _unpool_gradient(grad_output, indices, self.shape, *_max_geometry(2, kernel_size, stride, padding, dilation))


@lowering(aten.max_pool3d_with_indices_backward.default)
def max_pool3d_with_indices_backward(grad_output, self, kernel_size, stride, padding, dilation, ceil_mode, indices):
    """Gradient of `max_pool3d_with_indices`."""
    return _unpool_gradient(grad_output, indices, self.shape, *_max_geometry(3, kernel_size, stride, padding, dilation))


def _unpool(values, indices, output_size):
    """`values` at linear `indices` of planes of zeros of `output_size`."""
    rank, plane = len(output_size), math.prod(output_size)
    lead = values.shape[: values.ndim - rank]
    if not values.size:
        return jnp.zeros((*lead, *output_size), values.dtype)
    raise_if((indices < 0) | (indices >= plane), RuntimeError, "Found an invalid max index: {}", indices)
    rows = lax.broadcasted_iota(jnp.int32, (math.prod(lead), 1), 0)
    flat = jnp.zeros((math.prod(lead), plane), values.dtype)
    flat = flat.at[rows, indices.reshape(len(rows), -1).astype(jnp.int32)].set(values.reshape(len(rows), -1))
    return flat.reshape(*lead, *output_size)


@lowering(aten.max_unpool2d.default, memory_format_of=("self",), checks=True)
def max_unpool2d(self, indices, output_size):
    """The inverse of `max_pool2d_with_indices`: zero but for the maxima."""
    return _unpool(self, indices, output_size)


@lowering(aten.max_unpool3d.default, checks=True)
def max_unpool3d(self, indices, output_size, stride, padding):
    """The inverse of `max_pool3d_with_indices`: zero but for the maxima."""
    return _unpool(self, indices, output_size)


def _divisors(spatial, out, kernel, stride, padding, count_include_pad, divisor_override) -> "np.ndarray | int":
    """By what each window's sum is divided."""
    if divisor_override:
        return divisor_override
    factors = []
    for n, o, k, s, p in zip(spatial, out, kernel, stride, padding, strict=True):
        start = np.arange(o) * s - p
        end = np.minimum(start + k, n + p)  # a window cut off by ceil_mode counts only what lies in the padding
        factors.append(end - start if count_include_pad else np.minimum(end, n) - np.maximum(start, 0))
    counts = np.ones((), np.int32)
    for factor in factors:
        counts = counts[..., None] * factor.astype(np.int32)
    return int(counts.flat[0]) if counts.size and (counts == counts.flat[0]).all() else counts


def _avg_pool(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override):
    rank = len(kernel)
    lead = x.ndim - rank
    spatial = x.shape[lead:]
    one = (1,) * rank
    out = tuple(pooled_size(*g, ceil_mode) for g in zip(spatial, kernel, stride, padding, one, strict=True))
    behind = _window_pads(spatial, out, kernel, stride, padding, one)
    if kernel == stride and not any(padding) and all(b <= 0 for b in behind):
        # windows side by side: a sum over the dimensions of a reshape
        x = x[(..., *(slice(o * k) for o, k in zip(out, kernel, strict=True)))]
        split = [size for o, k in zip(out, kernel, strict=True) for size in (o, k)]
        total = x.reshape(*x.shape[:lead], *split).sum([lead + 2 * i + 1 for i in range(rank)], dtype=x.dtype)
    else:
        ones = (1,) * lead
        pads = [(0, 0)] * lead + [(p, max(b, 0)) for p, b in zip(padding, behind, strict=True)]
        total = lax.reduce_window(x, np.zeros((), x.dtype)[()], lax.add, (*ones, *kernel), (*ones, *stride), pads)
        total = total[(..., *(slice(o) for o in out))]
    divisor = _divisors(spatial, out, kernel, stride, padding, count_include_pad, divisor_override)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return lax.div(total, jnp.broadcast_to(jnp.asarray(divisor, x.dtype), total.shape))
    return total / jnp.asarray(divisor, x.dtype)


def _avg_geometry(rank, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    kernel = tuples(kernel_size, rank)
    return kernel, tuples(stride, rank, kernel), tuples(padding, rank), ceil_mode, count_include_pad, divisor_override


def _avg_pool_backward(grad, x, geometry):
    if grad.size == 0 or x.size == 0:
        return jnp.zeros(x.shape, x.dtype)
    grad = wide(grad)
    if not jnp.issubdtype(grad.dtype, jnp.floating):
        raise NotImplementedError("the gradient of a pooling of integers")
    return jax.linear_transpose(lambda v: _avg_pool(v, *geometry), jax.ShapeDtypeStruct(x.shape, grad.dtype))(grad)[0]


@lowering(aten.avg_pool2d.default)
def avg_pool2d(self, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
    """Means of windows."""
    return _avg_pool(
        wide(self), *_avg_geometry(2, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    )


@lowering(aten.avg_pool3d.default)
def avg_pool3d(self, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
    """Means of windows."""
    return _avg_pool(
        wide(self), *_avg_geometry(3, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    )


@lowering(aten.avg_pool2d_backward.default)
def avg_pool2d_backward(
    grad_output, self, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
):
    """Gradient of `avg_pool2d`."""
    return _avg_pool_backward(
        grad_output,
        self,
        _avg_geometry(2, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override),
    )


@lowering(aten.avg_pool3d_backward.default)
def avg_pool3d_backward(
    grad_output, self, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
):
    """Gradient of `avg_pool3d`."""
    return _avg_pool_backward(
        grad_output,
        self,
        _avg_geometry(3, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override),
    )
