"""Reflection and replication padding, sliding blocks (im2col, col2im), and their gradients."""

import jax
import jax.numpy as jnp
from jax import lax
from torchax.ops import Lowering, aten, lowering


def _pairs(padding):
    """``(dimension from the end, low, high)``."""
    return [(i + 1, padding[2 * i], padding[2 * i + 1]) for i in range(len(padding) // 2)]


def _crop(x, low, high, axis):
    return lax.slice_in_dim(x, max(-low, 0), x.shape[axis] - max(-high, 0), axis=axis)


def reflection_pad(x, padding):
    """Mirror at the borders, the border element not repeated."""
    for back, low, high in _pairs(padding):
        axis = x.ndim - back
        n = x.shape[axis]
        parts = [_crop(x, low, high, axis)]
        if low > 0:
            parts.insert(0, lax.rev(lax.slice_in_dim(x, 1, low + 1, axis=axis), (axis,)))
        if high > 0:
            parts.append(lax.rev(lax.slice_in_dim(x, n - 1 - high, n - 1, axis=axis), (axis,)))
        x = lax.concatenate(parts, axis) if len(parts) > 1 else parts[0]
    return x


def replication_pad(x, padding):
    """Repeat the border elements."""
    for back, low, high in _pairs(padding):
        axis = x.ndim - back
        n = x.shape[axis]
        parts = [_crop(x, low, high, axis)]
        if low > 0:
            first = lax.slice_in_dim(x, 0, 1, axis=axis)
            parts.insert(0, jnp.broadcast_to(first, (*x.shape[:axis], low, *x.shape[axis + 1 :])))
        if high > 0:
            last = lax.slice_in_dim(x, n - 1, n, axis=axis)
            parts.append(jnp.broadcast_to(last, (*x.shape[:axis], high, *x.shape[axis + 1 :])))
        x = lax.concatenate(parts, axis) if len(parts) > 1 else parts[0]
    return x


def _transposed(forward):
    """The gradient of a linear `forward`."""

    def backward(grad_output, x, padding):
        return jax.vjp(lambda value: forward(value, padding), x)[1](grad_output)[0]

    return backward


PADS = [
    Lowering(op=f"aten::{name}_pad{n}d{suffix}", fn=fn, table=True, memory_format_of=("self",))
    for name, forward in (("reflection", reflection_pad), ("replication", replication_pad))
    for suffix, fn in (("", forward), ("_backward", _transposed(forward)))
    for n in (1, 2, 3)
]


def _blocks(x, kernel_size, dilation, padding, stride):
    """``(N, C, kh, kw, rows, cols)``: the image under each kernel element."""
    x = jnp.pad(x, [(0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2])
    n, c, h, w = x.shape
    rows = (h - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    cols = (w - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    taps = []
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            top, left = i * dilation[0], j * dilation[1]
            end = (n, c, top + (rows - 1) * stride[0] + 1, left + (cols - 1) * stride[1] + 1)
            taps.append(lax.slice(x, (0, 0, top, left), end, (1, 1, *stride)))
    return jnp.stack(taps, 2).reshape(n, c * kernel_size[0] * kernel_size[1], rows * cols)


@lowering(aten.im2col.default)
def im2col(x, kernel_size, dilation, padding, stride):
    """Sliding blocks as columns, ``(N, C kh kw, L)``."""
    batched = x[None] if x.ndim == 3 else x
    blocks = _blocks(batched, kernel_size, dilation, padding, stride)
    return blocks[0] if x.ndim == 3 else blocks


@lowering(aten.col2im.default)
def col2im(x, output_size, kernel_size, dilation, padding, stride):
    """The transpose of `im2col`: overlapping blocks are added up."""
    batched = x[None] if x.ndim == 2 else x
    channels = batched.shape[1] // (kernel_size[0] * kernel_size[1])
    image = jax.ShapeDtypeStruct((batched.shape[0], channels, *output_size), x.dtype)
    transpose = jax.linear_transpose(lambda v: _blocks(v, kernel_size, dilation, padding, stride), image)
    image = transpose(batched)[0]
    return image[0] if x.ndim == 2 else image
