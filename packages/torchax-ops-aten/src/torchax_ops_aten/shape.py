"""Ops that put tensors together, repeat, reorder and mask their elements without arithmetic."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering

from ._index import at_least_1d, bound, check_elements, dimension, iota, position, result_dtype, scalar, wrap


@lowering(aten.cat.default)
def cat(tensors, dim=0):
    """Join along `dim`; empty 1-d tensors are skipped whatever the other shapes (old code relies on it)."""
    dtype = result_dtype(*tensors)
    parts = [t for t in tensors if t.shape != (0,)] or list(tensors[:1])
    return lax.concatenate([p.astype(dtype) for p in parts], dimension(dim, parts[0].ndim))


@lowering(aten.stack.default)
def stack(tensors, dim=0):
    """Join along a new dimension."""
    dtype = result_dtype(*tensors)
    dim = dimension(dim, tensors[0].ndim + 1)
    return lax.concatenate([lax.expand_dims(t.astype(dtype), (dim,)) for t in tensors], dim)


@lowering(aten.repeat.default)
def repeat(x, repeats):
    """Tile; more repeats than dimensions add dimensions in front."""
    return jnp.tile(x, tuple(repeats))


@lowering(aten.flip.default)
def flip(x, dims):
    """Reverse along `dims`."""
    return x if x.ndim == 0 else lax.rev(x, tuple(dimension(d, x.ndim) for d in dims))


@lowering(aten.roll.default, operands=("shifts",), memory_format_of=("self",))
def roll(x, shifts, dims=()):
    """Shift circularly; without `dims`, in the flattened order."""
    if x.size == 0:
        return x
    if not dims:
        return jnp.roll(x.reshape(-1), shifts[0], 0).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        x = jnp.roll(x, shift, dim)
    return x


def _diagonal_distance(x, diagonal):
    rows, cols = x.shape[-2:]
    if isinstance(diagonal, int):
        diagonal = min(max(diagonal, -rows - 1), cols + 1)
    else:
        diagonal = jnp.clip(diagonal, -rows - 1, cols + 1).astype(jnp.int32)
    return iota(rows, 2, 0) + diagonal - iota(cols, 2, 1)


@lowering(aten.tril.default, operands=("diagonal",))
def tril(x, diagonal=0):
    """Zero above the diagonal."""
    return jnp.where(_diagonal_distance(x, diagonal) >= 0, x, jnp.zeros((), x.dtype))


@lowering(aten.triu.default, operands=("diagonal",))
def triu(x, diagonal=0):
    """Zero below the diagonal."""
    return jnp.where(_diagonal_distance(x, diagonal) <= 0, x, jnp.zeros((), x.dtype))


@lowering(aten.pixel_shuffle.default, memory_format_of=("self",))
def pixel_shuffle(x, upscale_factor):
    """``(*, C r^2, H, W)`` to ``(*, C, H r, W r)``."""
    *batch, c, h, w = x.shape
    r, n = upscale_factor, len(batch)
    x = x.reshape(*batch, c // (r * r), r, r, h, w)
    x = x.transpose(*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return x.reshape(*batch, c // (r * r), h * r, w * r)


@lowering(aten.pixel_unshuffle.default)
def pixel_unshuffle(x, downscale_factor):
    """``(*, C, H r, W r)`` to ``(*, C r^2, H, W)``."""
    *batch, c, h, w = x.shape
    r, n = downscale_factor, len(batch)
    x = x.reshape(*batch, c, h // r, r, w // r, r)
    x = x.transpose(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return x.reshape(*batch, c * r * r, h // r, w // r)


@lowering(aten.select_scatter.default, operands=("index",))
def select_scatter(x, src, dim, index):
    """`x` with `src` at position `index` of `dim`."""
    dim = dimension(dim, x.ndim)
    return lax.dynamic_update_slice_in_dim(
        x, lax.expand_dims(src.astype(x.dtype), (dim,)), position(index, x.shape[dim]), dim
    )


@lowering(aten.select_backward.default, operands=("index",))
def select_backward(grad_output, input_sizes, dim, index):
    """Gradient of ``select``: zero elsewhere."""
    return select_scatter(jnp.zeros(tuple(input_sizes), grad_output.dtype), grad_output, dim, index)


@lowering(aten.slice_scatter.default, operands=("start", "end"))
def slice_scatter(x, src, dim=0, start=None, end=None, step=1):
    """`x` with `src` in the slice ``start:end:step`` of `dim`."""
    del end  # the slice's length is that of src
    dim = dimension(dim, x.ndim)
    size, length = x.shape[dim], src.shape[dim]
    src = src.astype(x.dtype)
    if length == 0 or x.size == 0:
        return x
    if length == size:
        return src
    start = bound(start, size, 0)
    if step == 1:
        return lax.dynamic_update_slice_in_dim(x, src, start, dim)
    config = [(0, 0, step - 1 if d == dim else 0) for d in range(x.ndim)]
    spread = lax.pad(src, jnp.zeros((), x.dtype), config)
    spread = lax.dynamic_update_slice_in_dim(jnp.zeros_like(x), spread, start, dim)
    distance = iota(size, x.ndim, dim) - start
    written = (distance >= 0) & (distance < length * step) & (distance % step == 0)
    return jnp.where(written, spread, x)


@lowering(aten.slice_backward.default, operands=("start", "end"))
def slice_backward(grad_output, input_sizes, dim, start, end, step):
    """Gradient of ``slice``: zero elsewhere."""
    dim = dimension(dim, len(input_sizes))
    size, length = input_sizes[dim], grad_output.shape[dim]
    if isinstance(start, int) and grad_output.size:  # a pad fuses better than an update
        first = bound(start, size, 0)
        last = first + (length - 1) * step + 1
        config = [(first, size - last, step - 1) if d == dim else (0, 0, 0) for d in range(len(input_sizes))]
        return lax.pad(grad_output, jnp.zeros((), grad_output.dtype), config)
    zeros = jnp.zeros(tuple(input_sizes), grad_output.dtype)
    if grad_output.size == 0:
        return zeros
    config = [(0, 0, step - 1 if d == dim else 0) for d in range(zeros.ndim)]
    spread = lax.pad(grad_output, jnp.zeros((), grad_output.dtype), config)
    return lax.dynamic_update_slice_in_dim(zeros, spread, bound(start, size, 0), dim)


@lowering(aten.diagonal_scatter.default)
def diagonal_scatter(x, src, offset=0, dim1=0, dim2=1):
    """`x` with `src` on a diagonal of dimensions `dim1`, `dim2`; the diagonal is the last dimension of `src`."""
    dim1, dim2 = dimension(dim1, x.ndim), dimension(dim2, x.ndim)
    front = jnp.moveaxis(x, (dim1, dim2), (0, 1))
    n = iota(src.shape[-1])
    front = front.at[n + max(-offset, 0), n + max(offset, 0)].set(
        jnp.moveaxis(src.astype(x.dtype), -1, 0), unique_indices=True, indices_are_sorted=True
    )
    return jnp.moveaxis(front, (0, 1), (dim1, dim2))


@lowering(aten.diagonal_backward.default)
def diagonal_backward(grad_output, input_sizes, offset, dim1, dim2):
    """Gradient of ``diagonal``: zero elsewhere."""
    return diagonal_scatter(jnp.zeros(tuple(input_sizes), grad_output.dtype), grad_output, offset, dim1, dim2)


@lowering(aten.unfold_backward.default)
def unfold_backward(grad_in, input_sizes, dim, size, step):
    """Gradient of ``unfold``: windows are added up where they overlap."""
    if not input_sizes:
        return grad_in.reshape(())
    dim = dimension(dim, len(input_sizes))
    windows = jnp.moveaxis(jnp.moveaxis(grad_in, -1, 0), dim + 1, 1)  # (size, windows, *rest)
    rows = iota(size, 2, 0) + step * iota(windows.shape[1], 2, 1)
    zeros = jnp.zeros((input_sizes[dim], *windows.shape[2:]), grad_in.dtype)
    return jnp.moveaxis(zeros.at[rows].add(windows), 0, dim)


@lowering(aten.repeat_interleave.Tensor, kind="dynamic")
def repeat_interleave(repeats, output_size=None):
    """Each position as many times as `repeats` says."""
    del output_size
    repeats = np.asarray(repeats)
    if (repeats < 0).any():
        raise RuntimeError("repeats can not be negative")
    return jnp.asarray(np.repeat(np.arange(repeats.size, dtype=repeats.dtype), repeats))


def has_output_size(repeats, output_size=None):
    """Whether the caller knows how long the result is."""
    return output_size is not None


@lowering(aten.repeat_interleave.Tensor, when=has_output_size, priority=1)
def repeat_interleave_static(repeats, output_size=None):
    """Each position as many times as `repeats` says, when the result's length is known."""
    ends = jnp.cumsum(repeats)
    return jnp.searchsorted(ends, jnp.arange(output_size, dtype=ends.dtype), side="right").astype(repeats.dtype)


@lowering(aten.take.default, checks=True)
def take(x, index):
    """Elements of the flattened `x`."""
    flat = x.reshape(-1)
    check_elements(index, flat.size)
    return flat.at[wrap(index, flat.size)].get(mode="clip", wrap_negative_indices=False) if flat.size else index


@lowering(aten.constant_pad_nd.default)
def constant_pad_nd(x, pad, value=0):
    """Pad with `value`, the last dimension first in `pad`; negative widths crop."""
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    return lax.pad(x, scalar(value, x.dtype), [(low, high, 0) for low, high in pairs])


@lowering(aten._chunk_cat.default)
def chunk_cat(tensors, dim, num_chunks):
    """Every tensor's chunks (padded with zeros) flattened after `dim` and joined."""
    dim = dimension(dim, tensors[0].ndim)
    parts = []
    for t in tensors:
        t = at_least_1d(t)
        length = -(-t.shape[dim] // num_chunks)
        widths = [(0, length * num_chunks - t.shape[dim], 0) if d == dim else (0, 0, 0) for d in range(t.ndim)]
        t = lax.pad(t, jnp.zeros((), t.dtype), widths)
        parts.append(t.reshape(*t.shape[:dim], num_chunks, -1))
    return jnp.concatenate(parts, dim + 1)
