"""Convolutions and transposed convolutions in any number of dimensions, and their gradients."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering

# A transposed convolution is the transpose of a convolution in its input, and so is the gradient; both are taken with
# jax.linear_transpose, which runs no forward computation.


def _ints(values: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def _correlate(x, w, stride, padding, dilation, groups: int):
    """Cross-correlation of ``[N, C, *spatial]`` with ``[O, C / groups, *kernel]``."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(w):
        re, im = (
            _correlate(x.real, w.real, stride, padding, dilation, groups),
            _correlate(x.imag, w.imag, stride, padding, dilation, groups),
        )
        mixed = _correlate(x.real + x.imag, w.real + w.imag, stride, padding, dilation, groups)
        return lax.complex(re - im, mixed - re - im)
    spatial = "DHWXYZ"[: x.ndim - 2]
    return lax.conv_general_dilated(
        x, w, window_strides=stride, padding=[(p, p) for p in padding], rhs_dilation=dilation,
        dimension_numbers=("NC" + spatial, "OI" + spatial, "NC" + spatial), feature_group_count=groups,
        preferred_element_type=_accumulator(x.dtype),
    )  # fmt: skip


def _accumulator(dtype):
    # the CPU compiler would add up float16 products in float16
    return jnp.float32 if dtype == jnp.float16 else None


def _transposed_shape(x, w, stride, padding, dilation, output_padding, groups: int) -> tuple[int, ...]:
    spatial = [
        (n - 1) * s - 2 * p + d * (k - 1) + op + 1
        for n, k, s, p, d, op in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, output_padding, strict=True)
    ]
    return (x.shape[0], w.shape[1] * groups, *spatial)


def _adjoint(y, w, shape, stride, padding, dilation, groups: int):
    """Transpose of `_correlate` in its input: what of an input of `shape` reaches `y`."""

    def forward(x):
        out = _correlate(x, w, stride, padding, dilation, groups)
        # an output padding of a stride or more lets the convolution see more positions than y has
        return out[(slice(None), slice(None), *(slice(n) for n in y.shape[2:]))]

    return _transpose(forward, y, shape)


def _adjoint_kernel(y, x, shape, stride, padding, dilation, groups: int):
    """Transpose of `_correlate` in its kernel."""

    def forward(w):
        out = _correlate(x, w, stride, padding, dilation, groups)
        return out[(slice(None), slice(None), *(slice(n) for n in y.shape[2:]))]

    return _transpose(forward, y, shape)


def _transpose(forward, y, shape):
    if jnp.issubdtype(y.dtype, jnp.floating):
        dtype = jnp.float32 if y.dtype == jnp.float16 else y.dtype
        (x,) = jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, y.dtype))(
            y.astype(dtype) if dtype != y.dtype else y
        )
        return x
    if jnp.issubdtype(y.dtype, jnp.complexfloating):
        return jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, y.dtype))(y)[0]
    # jax transposes no integer program: float64 holds products of 32 bits exactly, as torch's own path for int64 does
    raise NotImplementedError("the gradient of a convolution of integers")


def _tiles(kernel, stride, padding, dilation, output_padding) -> bool:
    """Whether a transposed convolution writes each element of its result once."""
    return all(
        k == s and d == 1 and p == op == 0
        for k, s, p, d, op in zip(kernel, stride, padding, dilation, output_padding, strict=True)
    )


def _tiled(x, w, groups: int):
    """The transposed convolution of `_tiles` as a matrix product; as a convolution, most of what it multiplies is zero."""
    spatial, kernel = x.shape[2:], w.shape[2:]
    at, within = "hijkl"[: len(spatial)], "pqrst"[: len(spatial)]
    x = x.reshape(x.shape[0], groups, -1, *spatial)
    w = w.reshape(groups, -1, *w.shape[1:])
    both = "".join(a + b for a, b in zip(at, within, strict=True))
    out = jnp.einsum(f"ngc{at},gco{within}->ngo{both}", x, w, preferred_element_type=_accumulator(x.dtype))
    return out.reshape(x.shape[0], -1, *(n * k for n, k in zip(spatial, kernel, strict=True)))


def _empty(x, w) -> bool:
    return x.size == 0 or w.size == 0


@lowering(aten.convolution.default, memory_format_of=("input", "weight"))
def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    """Cross-correlation, or its transpose, of ``[N, C, *spatial]``."""
    rank = input.ndim - 2
    if min(padding, default=0) < 0:
        raise RuntimeError("negative padding is not supported")
    stride, padding, dilation, output_padding = (_ints(v, rank) for v in (stride, padding, dilation, output_padding))
    if transposed:
        shape = _transposed_shape(input, weight, stride, padding, dilation, output_padding, groups)
        if _empty(input, weight) or 0 in shape:
            out = jnp.zeros(shape, input.dtype)
        elif _tiles(weight.shape[2:], stride, padding, dilation, output_padding):
            out = _tiled(input, weight, groups)
        elif jnp.issubdtype(input.dtype, jnp.inexact):
            out = _adjoint(input, weight, shape, stride, padding, dilation, groups)
        else:
            out = _dilated(input, weight, stride, padding, dilation, output_padding, groups)
    elif _empty(input, weight):
        spatial = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        ]
        out = jnp.zeros((input.shape[0], weight.shape[0], *spatial), input.dtype)
    else:
        out = _correlate(input, weight, stride, padding, dilation, groups)
    return out if bias is None else out + bias.reshape(-1, *[1] * rank).astype(out.dtype)


def _dilated(x, w, stride, padding, dilation, output_padding, groups: int):
    """The transposed convolution as a convolution of the dilated input (integers, which jax does not transpose)."""
    kernel = w.shape[2:]
    w = jnp.flip(w, range(2, w.ndim)).reshape(groups, w.shape[0] // groups, w.shape[1], *kernel)
    w = jnp.swapaxes(w, 1, 2).reshape(-1, w.shape[1], *kernel)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    spatial = "DHWXYZ"[: x.ndim - 2]
    return lax.conv_general_dilated(
        x, w, window_strides=[1] * len(kernel), lhs_dilation=stride, rhs_dilation=dilation,
        padding=[(r - p, r - p + op) for r, p, op in zip(reach, padding, output_padding, strict=True)],
        dimension_numbers=("NC" + spatial, "OI" + spatial, "NC" + spatial), feature_group_count=groups,
    )  # fmt: skip


@lowering(aten._convolution.default, memory_format_of=("input", "weight"))
def _convolution(
    input,
    weight,
    bias,
    stride,
    padding,
    dilation,
    transposed,
    output_padding,
    groups,
    benchmark,
    deterministic,
    cudnn_enabled,
    allow_tf32,
):
    """`convolution`; the switches choose among torch's backends."""
    return convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


@lowering(aten.convolution_overrideable.default)
def convolution_overrideable(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    """`convolution`, as devices outside of torch are asked for it."""
    return convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


@lowering(aten.convolution_backward.default)
def convolution_backward(
    grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    """Gradients of `convolution` with respect to input, weight and bias."""
    rank = input.ndim - 2
    stride, padding, dilation, output_padding = (_ints(v, rank) for v in (stride, padding, dilation, output_padding))
    grad_input = grad_weight = grad_bias = None
    geometry = (stride, padding, dilation, groups)
    tiled = transposed and _tiles(weight.shape[2:], stride, padding, dilation, output_padding)
    empty = grad_output.size == 0 or _empty(input, weight)
    if output_mask[0]:
        w = weight.conj() if jnp.iscomplexobj(weight) else weight
        if empty:
            grad_input = jnp.zeros_like(input)
        elif tiled:
            grad_input = _transpose(lambda x: _tiled(x, w, groups), grad_output, input.shape)
        elif transposed:
            grad_input = _correlate(grad_output, w, *geometry)[(..., *(slice(n) for n in input.shape[2:]))]
        else:
            grad_input = _adjoint(grad_output, w, input.shape, *geometry)
    if output_mask[1]:
        x = input.conj() if jnp.iscomplexobj(input) else input
        if empty:
            grad_weight = jnp.zeros_like(weight)
        elif tiled:
            grad_weight = _transpose(lambda w: _tiled(x, w, groups), grad_output, weight.shape)
        elif transposed:
            grad_weight = _adjoint_kernel(x, grad_output, weight.shape, *geometry)
        else:
            grad_weight = _adjoint_kernel(grad_output, x, weight.shape, *geometry)
    if output_mask[2]:
        axes = (0, *range(2, grad_output.ndim))
        wide = jnp.float32 if grad_output.dtype in (jnp.bfloat16, jnp.float16) else grad_output.dtype
        grad_bias = grad_output.sum(axes, dtype=wide).astype(grad_output.dtype)
    return grad_input, grad_weight, grad_bias


@lowering(aten.convolution_backward_overrideable.default)
def convolution_backward_overrideable(
    grad_output, input, weight, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    """`convolution_backward`, as devices outside of torch are asked for it."""
    return convolution_backward(
        grad_output, input, weight, None, stride, padding, dilation, transposed, output_padding, groups, output_mask
    )


@lowering(aten.conv_tbc.default)
def conv_tbc(self, weight, bias, pad=0):
    """Convolution over time of ``[T, B, C]`` with ``[k, C, O]``."""
    out = lax.conv_general_dilated(
        self, weight, window_strides=(1,), padding=[(pad, pad)], dimension_numbers=("HNC", "HIO", "HNC"),
        preferred_element_type=_accumulator(self.dtype),
    )  # fmt: skip
    return out + bias.astype(out.dtype)


@lowering(aten.conv_tbc_backward.default)
def conv_tbc_backward(self, input, weight, bias, pad):
    """Gradients of `conv_tbc` with respect to input, weight and bias; `self` is the gradient of the result."""
    return jax.vjp(lambda x, w, b: conv_tbc(x, w, b, pad).astype(self.dtype), input, weight, bias)[1](self)
