"""Discrete Fourier transforms over lists of dimensions."""

import math

import jax.numpy as jnp
import torch
from jax import lax
from torchax.ops import aten, lowering, raise_if

from .shape import unfold_backward

# Codes of torch: 0 leaves the sums as they are, 1 divides by the square root of their length, 2 by the length.
_NONE, _ROOT, _LENGTH = 0, 1, 2
_MOST = 3  # dimensions that one lax.fft takes


def _normalized(x, count: int, normalization: int):
    if normalization == _NONE:
        return x
    return x * (1 / (math.sqrt(count) if normalization == _ROOT else count))


def _over(x, dims, kind, lengths):
    """`lax.fft` over `dims`, which are moved to the end for it."""
    dims = [d % x.ndim for d in dims]
    ends = tuple(range(x.ndim - len(dims), x.ndim))
    return jnp.moveaxis(lax.fft(jnp.moveaxis(x, dims, ends), kind, tuple(lengths)), ends, dims)


def _complex(x, dims, forward: bool):
    """Unnormalized complex transform over any number of dimensions."""
    for i in range(0, len(dims), _MOST):
        group = dims[i : i + _MOST]
        lengths = [x.shape[d] for d in group]
        x = _over(x, group, lax.FftType.FFT if forward else lax.FftType.IFFT, lengths)
        x = x if forward else x * math.prod(lengths)
    return x


def _size(x, dims):
    return math.prod(x.shape[d] for d in dims)


def _by_strides(x, dims):
    return sorted(dims, key=lambda d: -x.stride(d))


def _laid_out(result, x, dims):
    """`result` as CPU lays it out: what is not transformed, then `dims`, the first by the strides of `x`.

    torch's meta kernels do not always say so.
    """
    dims = [d % x.dim() for d in dims]
    batch = _by_strides(x, [d for d in range(x.dim()) if d not in dims])
    order = (*batch, *_by_strides(x, dims[:-1]), dims[-1])
    return torch.empty_permuted(result.shape, order, dtype=result.dtype, device="meta")


def _r2c_meta(result, self, dim, normalization, onesided):
    return _laid_out(result, self, dim)


def _c2r_meta(result, self, dim, normalization, last_dim_size):
    x = torch.ops.aten._fft_c2c(self, dim[:-1], normalization, False) if len(dim) > 1 else self
    return _laid_out(result, x, dim[-1:])


@lowering(aten._fft_c2c.default)
def fft_c2c(self, dim, normalization, forward):
    """Complex to complex."""
    if self.size == 0 or not dim:
        return self
    return _normalized(_complex(self, dim, forward), _size(self, dim), normalization)


@lowering(aten._fft_r2c.default, meta=_r2c_meta)
def fft_r2c(self, dim, normalization, onesided):
    """Real to complex; `onesided` keeps the first half of the last dimension."""
    last = dim[-1] % self.ndim
    n = self.shape[last]
    if self.size == 0:
        shape = [n // 2 + 1 if onesided and i == last else s for i, s in enumerate(self.shape)]
        return jnp.zeros(shape, jnp.result_type(self.dtype, jnp.complex64))
    if not onesided:
        return _normalized(
            _complex(self.astype(jnp.result_type(self.dtype, jnp.complex64)), dim, True),
            _size(self, dim),
            normalization,
        )
    out = _complex(_over(self, [last], lax.FftType.RFFT, [n]), dim[:-1], True)
    return _normalized(out, _size(self, dim), normalization)


@lowering(aten._fft_c2r.default, meta=_c2r_meta)
def fft_c2r(self, dim, normalization, last_dim_size):
    """Complex to real, from the first half of the last dimension."""
    last = dim[-1] % self.ndim
    shape = [last_dim_size if i == last else s for i, s in enumerate(self.shape)]
    if self.size == 0 or last_dim_size == 0:
        return jnp.zeros(shape, self.real.dtype)
    x = _complex(self, dim[:-1], False)
    # the compiler's inverse divides by the length
    out = _over(x, [last], lax.FftType.IRFFT, [last_dim_size]) * last_dim_size
    return _normalized(out, math.prod(shape[d % self.ndim] for d in dim), normalization)


@lowering(aten.istft.default, whole=True, checks=True, meta=False)
def istft(
    self,
    n_fft,
    hop_length=None,
    win_length=None,
    window=None,
    center=True,
    normalized=False,
    onesided=None,
    length=None,
    return_complex=False,
):
    """Inverse of the short-time transform: overlapping frames are added up and divided by the sum of squared windows.

    Kept whole because torch's decomposition asks for the values of that sum, which compiled functions do not know.
    """
    hop = n_fft // 4 if hop_length is None else hop_length
    width = n_fft if win_length is None else win_length
    window = jnp.ones((width,), jnp.finfo(self.dtype).dtype) if window is None else window
    left = (n_fft - width) // 2
    window = jnp.pad(window, (left, n_fft - width - left))
    spectra, scale = jnp.swapaxes(self, -1, -2), _ROOT if normalized else _LENGTH
    if return_complex:
        frames = fft_c2c(spectra, [-1], scale, False)
    else:
        frames = fft_c2r(spectra[..., : n_fft // 2 + 1], [-1], scale, n_fft)
    *batch, count, _ = frames.shape
    total = n_fft + hop * (count - 1)
    begin = n_fft // 2 if center else 0
    end = begin + length if length is not None else total - begin
    signal = unfold_backward(frames * window, [*batch, total], -1, n_fft, hop)[..., begin:end]
    squares = jnp.broadcast_to(jnp.square(window), (count, n_fft))
    envelope = unfold_backward(squares, [total], 0, n_fft, hop)[begin:end]
    raise_if(jnp.abs(envelope) < 1e-11, RuntimeError, "istft: windows, squared and added up, are zero somewhere")
    missing = end - begin - signal.shape[-1]
    return jnp.pad(signal / envelope, [*[(0, 0)] * len(batch), (0, missing)])
