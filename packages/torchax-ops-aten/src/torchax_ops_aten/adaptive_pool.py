"""Pooling whose windows follow from the output size (adaptive) or are drawn at random (fractional)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering

from .norm import wide
from .pool import _max_pool, _unpool_gradient, scatter_planes
from .resample import Taps, resample


def _windows(n: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices ``[out, T]`` of each window's elements, and which of them count."""
    start = np.arange(out) * n // out
    end = -(-(np.arange(1, out + 1) * n) // out)
    longest = int((end - start).max()) if out else 1
    index = start[:, None] + np.arange(longest)
    return np.minimum(index, n - 1).astype(np.int32), index < end[:, None]


def _adaptive_avg(x, output_size):
    rank = len(output_size)
    if 0 in x.shape or 0 in output_size:
        return jnp.zeros((*x.shape[:-rank], *output_size), x.dtype)
    for i, out in enumerate(output_size):
        axis = x.ndim - rank + i
        n = x.shape[axis]
        if n % out == 0:
            x = x.reshape(*x.shape[:axis], out, n // out, *x.shape[axis + 1 :]).mean(axis + 1)
        else:
            index, valid = _windows(n, out)
            x = resample(x, axis, Taps(index, valid / valid.sum(1, keepdims=True), valid))
    return x


def _adaptive_avg_transpose(grad, x, output_size):
    if grad.size == 0 or x.size == 0:
        return jnp.zeros(x.shape, x.dtype)
    grad = wide(grad)
    return jax.linear_transpose(lambda v: _adaptive_avg(v, output_size), jax.ShapeDtypeStruct(x.shape, grad.dtype))(
        grad
    )[0]


@lowering(aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(self, output_size):
    """Means over windows that cover each plane."""
    return _adaptive_avg(wide(self), tuple(output_size))


@lowering(aten._adaptive_avg_pool3d.default)
def adaptive_avg_pool3d(self, output_size):
    """Means over windows that cover each volume."""
    return _adaptive_avg(wide(self), tuple(output_size))


@lowering(aten._adaptive_avg_pool2d_backward.default)
def adaptive_avg_pool2d_backward(grad_output, self):
    """Gradient of `adaptive_avg_pool2d`."""
    return _adaptive_avg_transpose(grad_output, self, grad_output.shape[-2:])


@lowering(aten._adaptive_avg_pool3d_backward.default)
def adaptive_avg_pool3d_backward(grad_output, self):
    """Gradient of `adaptive_avg_pool3d`."""
    return _adaptive_avg_transpose(grad_output, self, grad_output.shape[-3:])


def _argmax_last_nan(values):
    """First maximum over the last dimension, or the last NaN."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return jnp.argmax(values, axis=-1).astype(jnp.int32)
    nan = jnp.isnan(values)
    size = values.shape[-1]
    last_nan = size - 1 - jnp.argmax(jnp.flip(nan, -1), axis=-1)
    return jnp.where(nan.any(-1), last_nan, jnp.argmax(values, axis=-1)).astype(jnp.int32)


def _adaptive_max(x, output_size):
    """Maxima over windows that cover the last dimensions, and their linear indices."""
    rank = len(output_size)
    lead, spatial = x.shape[:-rank], x.shape[-rank:]
    if 0 in x.shape or 0 in output_size:
        return jnp.zeros((*lead, *output_size), x.dtype), jnp.zeros((*lead, *output_size), jnp.int32)
    if all(n % o == 0 for n, o in zip(spatial, output_size, strict=True)):
        kernel = tuple(n // o for n, o in zip(spatial, output_size, strict=True))
        return _max_pool(x, kernel, kernel, (0,) * rank, (1,) * rank, False)
    at, inside = np.zeros((), np.int32), np.ones((), bool)
    for n, out in zip(spatial, output_size, strict=True):
        index, valid = _windows(n, out)
        # [outputs so far, elements so far] x [out, T] -> [outputs, elements]
        at = (at[..., None, None] * n + index).astype(np.int32)
        inside = inside[..., None, None] & valid
    # bring the dimensions (o1, t1, o2, t2, ...) into (o1, o2, ..., t1 * t2 * ...)
    order = [2 * i for i in range(rank)] + [2 * i + 1 for i in range(rank)]
    at = at.transpose(order).reshape(*output_size, -1)
    inside = inside.transpose(order).reshape(*output_size, -1)
    values = jnp.take(x.reshape(*lead, -1), jnp.asarray(at), axis=-1)
    low = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    best = _argmax_last_nan(jnp.where(jnp.asarray(inside), values, jnp.asarray(low, x.dtype)))[..., None]
    indices = jnp.take_along_axis(jnp.broadcast_to(jnp.asarray(at), values.shape), best, -1)
    return jnp.take_along_axis(values, best, -1)[..., 0], indices[..., 0]


def _adaptive_max_backward(grad, x, indices, rank):
    spatial, out = x.shape[-rank:], grad.shape[-rank:]
    if grad.size and x.size and all(n % o == 0 for n, o in zip(spatial, out, strict=True)):
        kernel = tuple(n // o for n, o in zip(spatial, out, strict=True))
        return _unpool_gradient(grad, indices, x.shape, kernel, kernel, (0,) * rank, (1,) * rank)
    return scatter_planes(wide(grad), indices, x.shape, rank)


@lowering(aten.adaptive_max_pool2d.default)
def adaptive_max_pool2d(self, output_size):
    """Maxima over windows that cover each plane, and their indices in it."""
    return _adaptive_max(self, tuple(output_size))


@lowering(aten.adaptive_max_pool3d.default)
def adaptive_max_pool3d(self, output_size):
    """Maxima over windows that cover each volume, and their indices in it."""
    return _adaptive_max(self, tuple(output_size))


@lowering(aten.adaptive_max_pool2d_backward.default)
def adaptive_max_pool2d_backward(grad_output, self, indices):
    """Gradient of `adaptive_max_pool2d`."""
    return _adaptive_max_backward(grad_output, self, indices, 2)


@lowering(aten.adaptive_max_pool3d_backward.default)
def adaptive_max_pool3d_backward(grad_output, self, indices):
    """Gradient of `adaptive_max_pool3d`."""
    return _adaptive_max_backward(grad_output, self, indices, 3)


def _fractional_starts(sample, n: int, out: int, k: int):
    """Where the `out` windows of length k begin, int32 ``[..., out]``; `sample` in [0, 1) shifts them (Graham, 2014)."""
    if out == 1:
        return jnp.full((*sample.shape, 1), n - k, jnp.int32)
    alpha = jnp.asarray((n - k) / (out - 1), sample.dtype)
    steps = lax.broadcasted_iota(jnp.int32, (out,), 0).astype(sample.dtype)
    starts = ((steps + sample[..., None]) * alpha).astype(jnp.int32) - (sample[..., None] * alpha).astype(jnp.int32)
    return starts.at[..., -1].set(n - k)


def _fractional_max(x, kernel, output_size, samples, columns):
    """Maxima over random windows and their indices; `columns[i]` is the column of `samples` for dimension i."""
    rank = len(kernel)
    batched = x if x.ndim == rank + 2 else x[None]
    samples = samples if x.ndim == rank + 2 else samples.reshape(-1, *samples.shape[-2:])[:1]
    lead, spatial = batched.shape[:2], batched.shape[2:]
    if not x.size:
        shape = (*x.shape[: x.ndim - rank], *output_size)
        return jnp.zeros(shape, x.dtype), jnp.zeros(shape, jnp.int32)
    at = jnp.zeros((*lead, *[1] * (2 * rank)), jnp.int32)
    for i, (n, out, k) in enumerate(zip(spatial, output_size, kernel, strict=True)):
        starts = _fractional_starts(samples[..., columns[i]], n, out, k)
        where = starts.reshape(*lead, *[out if j == i else 1 for j in range(rank)], *[1] * rank)
        within = lax.broadcasted_iota(jnp.int32, (k,), 0).reshape([k if j == i else 1 for j in range(rank)])
        at = at * n + where + within
    at = jnp.broadcast_to(at, (*lead, *output_size, *kernel)).reshape(*lead, -1)
    values = jnp.take_along_axis(batched.reshape(*lead, -1), at, -1).reshape(*lead, *output_size, math.prod(kernel))
    best = _argmax_last_nan(values)[..., None]
    out = jnp.take_along_axis(values, best, -1)[..., 0]
    indices = jnp.take_along_axis(at.reshape(values.shape), best, -1)[..., 0]
    return (out, indices) if x.ndim == rank + 2 else (out[0], indices[0])


@lowering(aten.fractional_max_pool2d.default)
def fractional_max_pool2d(self, kernel_size, output_size, random_samples):
    """Maxima over windows placed by `random_samples`, and their indices."""
    return _fractional_max(self, tuple(kernel_size), tuple(output_size), random_samples, (1, 0))


@lowering(aten.fractional_max_pool3d.default)
def fractional_max_pool3d(self, kernel_size, output_size, random_samples):
    """Maxima over windows placed by `random_samples`, and their indices."""
    return _fractional_max(self, tuple(kernel_size), tuple(output_size), random_samples, (0, 1, 2))


@lowering(aten.fractional_max_pool2d_backward.default)
def fractional_max_pool2d_backward(grad_output, self, kernel_size, output_size, indices):
    """Gradient of `fractional_max_pool2d`."""
    return scatter_planes(wide(grad_output), indices, self.shape, 2)


@lowering(aten.fractional_max_pool3d_backward.default)
def fractional_max_pool3d_backward(grad_output, self, kernel_size, output_size, indices):
    """Gradient of `fractional_max_pool3d`."""
    return scatter_planes(wide(grad_output), indices, self.shape, 3)
