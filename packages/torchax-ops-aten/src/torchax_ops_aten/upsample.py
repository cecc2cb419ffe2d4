"""Interpolation of the last dimensions to another size: nearest, linear, cubic, with and without antialiasing.

Every kind is separable: a few taps along each dimension in turn. Positions and weights are computed when the program is
made, in the type in which CPU torch computes them (`ATen/native/UpSample.h`).
"""

import functools

import jax.numpy as jnp
import numpy as np
from torchax.ops import Lowering, aten, op_name

from .norm import wide
from .resample import Taps, resample, resample_transpose


def _ratio(n: int, out: int, scale: float | None, real) -> np.floating:
    """Distance of two outputs, in inputs."""
    return real(1.0 / scale) if scale is not None and scale > 0 else real(n) / real(out)


def _corner_ratio(n: int, out: int, align_corners: bool, scale: float | None, real):
    if align_corners:
        return real(n - 1) / real(out - 1) if out > 1 else real(0)
    return _ratio(n, out, scale, real)


def _nearest(n: int, out: int, scale: float | None, real, exact: bool) -> Taps:
    at = np.arange(out)
    if out == n:
        index = at
    elif out == 2 * n and not exact:
        index = at // 2
    else:
        ratio = _ratio(n, out, scale, np.float32)
        index = np.floor((at.astype(np.float32) + np.float32(0.5 if exact else 0)) * ratio).astype(np.int64)
    return Taps(np.minimum(index, n - 1).astype(np.int32)[:, None])


def _source(n: int, out: int, align_corners: bool, scale: float | None, real):
    ratio = _corner_ratio(n, out, align_corners, scale, real)
    at = np.arange(out).astype(real)
    return ratio * at if align_corners else ratio * (at + real(0.5)) - real(0.5)


def _linear(n: int, out: int, align_corners: bool, scale: float | None, real) -> Taps:
    if n == out:
        return Taps(np.arange(n, dtype=np.int32)[:, None])
    source = np.maximum(_source(n, out, align_corners, scale, real), 0)
    low = np.minimum(source.astype(np.int64), n - 1)
    upper = np.clip(source - low.astype(real), 0, 1)
    index = np.stack([low, np.minimum(low + 1, n - 1)], 1)
    return Taps(index.astype(np.int32), np.stack([1 - upper, upper], 1))


def _cubic_weight(x: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution kernel (Keys, 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _cubic(n: int, out: int, align_corners: bool, scale: float | None, real) -> Taps:
    source = _source(n, out, align_corners, scale, real)
    low = np.floor(source)
    offsets = np.arange(-1, 3)
    weight = _cubic_weight((source - low)[:, None] - offsets, -0.75)
    index = np.clip(low.astype(np.int64)[:, None] + offsets, 0, n - 1)
    return Taps(index.astype(np.int32), weight)


def _antialiased(n: int, out: int, align_corners: bool, scale: float | None, real, cubic: bool) -> Taps:
    """A filter as wide as an output is apart, normalized over the inputs that exist."""
    if n == out:
        return Taps(np.arange(n, dtype=np.int32)[:, None])
    ratio = _corner_ratio(n, out, align_corners, scale, real)
    width = 2 if cubic else 1
    support = width * ratio if ratio >= 1 else real(width)
    stretch = 1 / ratio if ratio >= 1 else real(1)
    center = ratio * (np.arange(out).astype(real) + real(0.5))
    begin = np.maximum((center - support + real(0.5)).astype(np.int64), 0)
    end = np.minimum((center + support + real(0.5)).astype(np.int64), n)
    index = begin[:, None] + np.arange(int((end - begin).max()))
    valid = index < end[:, None]
    x = (index - center[:, None] + real(0.5)) * stretch
    weight = np.where(valid, _cubic_weight(x, -0.5) if cubic else np.maximum(1 - np.abs(x), 0), 0)
    total = weight.sum(1, keepdims=True)
    return Taps(np.minimum(index, n - 1).astype(np.int32), weight / np.where(total == 0, 1, total), valid)


def _real(dtype):
    return np.float64 if dtype == jnp.float64 else np.float32


def _fixed_point(taps: Taps) -> tuple[Taps, int]:
    """Integer weights, scaled by a power of two as large as 16 bits allow, and its exponent."""
    weight = np.ones(taps.index.shape) if taps.weight is None else taps.weight.astype(np.float64)
    if taps.valid is not None:
        weight = np.where(taps.valid, weight, 0)
    # taps that the border clips to one input are rounded as one
    same = taps.index[:, :, None] == taps.index[:, None, :]
    first = same.argmax(2) == np.arange(taps.index.shape[1])
    weight = np.where(first, (same * weight[:, None, :]).sum(2), 0)
    bits = next((b for b in range(22) if int(0.5 + weight.max() * (1 << (b + 1))) >= 1 << 15), 22)
    rounded = np.trunc(weight * (1 << bits) + np.where(weight < 0, -0.5, 0.5))
    return Taps(taps.index, rounded.astype(np.int32)), bits


def _bytes(x, output_size, taps):
    """Images of bytes: each dimension in fixed point, the last one first, with bytes in between."""
    for i in reversed(range(len(output_size))):
        axis = x.ndim - len(output_size) + i
        weighted, bits = _fixed_point(taps[i](x.shape[axis], output_size[i], np.float64))
        total = resample(x.astype(jnp.int32), axis, weighted) + (1 << (bits - 1))
        x = jnp.clip(total >> bits, 0, 255).astype(jnp.uint8)
    return x


def _forward(x, output_size, taps):
    wanted = wide(x)
    integer = not jnp.issubdtype(x.dtype, jnp.floating)
    for i, out in enumerate(output_size):
        axis = x.ndim - len(output_size) + i
        t = taps[i](x.shape[axis], out, _real(x.dtype))
        if integer and t.weight is not None and jnp.issubdtype(wanted.dtype, jnp.integer):
            wanted = wanted.astype(jnp.float32)
        wanted = resample(wanted, axis, t)
    if integer and jnp.issubdtype(wanted.dtype, jnp.floating):
        info = jnp.iinfo(x.dtype)
        wanted = jnp.clip(jnp.floor(wanted + 0.5), info.min, info.max).astype(x.dtype)
    return wanted


def _backward(grad, output_size, input_size, taps):
    rank = len(output_size)
    dtype, grad = grad.dtype, wide(grad)
    for i, n in enumerate(input_size[-rank:]):
        axis = grad.ndim - rank + i
        grad = resample_transpose(grad, axis, taps[i](n, output_size[i], _real(dtype)), n)
    return grad


def _nearest_taps(scales, exact):
    return [lambda n, out, real, s=s: _nearest(n, out, s, real, exact) for s in scales]


def _kernel_taps(make, align_corners, scales):
    return [lambda n, out, real, s=s: make(n, out, align_corners, s, real) for s in scales]


def _nearest_forward(exact, self, output_size, *scales):
    return _forward(self, output_size, _nearest_taps(_all(scales, output_size), exact))


def _nearest_backward(exact, grad_output, output_size, input_size, *scales):
    return _backward(grad_output, output_size, input_size, _nearest_taps(_all(scales, output_size), exact))


def _kernel_forward(make, self, output_size, align_corners, *scales):
    forward = _bytes if self.dtype == jnp.uint8 and len(output_size) == 2 and self.size else _forward
    return forward(self, output_size, _kernel_taps(make, align_corners, _all(scales, output_size)))


def _kernel_backward(make, grad_output, output_size, input_size, align_corners, *scales):
    return _backward(grad_output, output_size, input_size, _kernel_taps(make, align_corners, _all(scales, output_size)))


def _all(scales, output_size):
    return (*scales, *[None] * (len(output_size) - len(scales)))


def _records(name: str, forward, backward) -> list[Lowering]:
    return [
        Lowering(op=op_name(getattr(aten, name).default), fn=forward, family="upsample", table=True),
        Lowering(op=op_name(getattr(aten, name + "_backward").default), fn=backward, family="upsample", table=True),
    ]


def _family() -> list[Lowering]:
    found = []
    for rank in (1, 2, 3):
        for name, exact in ((f"upsample_nearest{rank}d", False), (f"_upsample_nearest_exact{rank}d", True)):
            found += _records(
                name, functools.partial(_nearest_forward, exact), functools.partial(_nearest_backward, exact)
            )
    kernels = {
        "upsample_linear1d": _linear,
        "upsample_bilinear2d": _linear,
        "upsample_trilinear3d": _linear,
        "upsample_bicubic2d": _cubic,
        "_upsample_bilinear2d_aa": functools.partial(_antialiased, cubic=False),
        "_upsample_bicubic2d_aa": functools.partial(_antialiased, cubic=True),
    }
    for name, make in kernels.items():
        found += _records(name, functools.partial(_kernel_forward, make), functools.partial(_kernel_backward, make))
    return found


UPSAMPLE = _family()
