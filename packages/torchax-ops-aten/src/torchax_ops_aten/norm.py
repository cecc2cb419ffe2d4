"""Layer, group and RMS normalization, weight normalization and renorm, with their gradients.

Statistics of float16 and bfloat16 inputs are computed in float32. With ``y = (x - mean) * rstd`` over n values and the
gradient g of y, the gradient of x is ``rstd * (g - mean(g) - y * mean(g * y))`` (Ioffe and Szegedy, 2015).
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering


def wide(x: Any) -> Any:
    """`x` (an array or None) in the type in which sums are made: float32 for 16-bit floats."""
    return x.astype(jnp.float32) if x is not None and x.dtype in (jnp.bfloat16, jnp.float16) else x


def moments(x, axes):
    """Mean and biased variance over `axes`, which stay as ones."""
    mean = x.mean(axes, keepdims=True)
    return mean, jnp.square(x - mean).mean(axes, keepdims=True)


def normalized_gradient(grad, y, rstd, axes):
    """Gradient of x for the gradient of ``y = (x - mean) * rstd``."""
    return rstd * (grad - grad.mean(axes, keepdims=True) - y * (grad * y).mean(axes, keepdims=True))


@lowering(aten.native_layer_norm.default)
def native_layer_norm(input, normalized_shape, weight, bias, eps):
    """Normalize over the last dimensions; the result, mean and 1 / standard deviation."""
    x, weight, bias = wide(input), wide(weight), wide(bias)
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    mean, var = moments(x, axes)
    rstd = lax.rsqrt(var + eps)
    out = (x - mean) * rstd
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.astype(input.dtype), mean, rstd


@lowering(aten.native_layer_norm_backward.default)
def native_layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask):
    """Gradients of input, weight and bias."""
    grad, x = wide(grad_out), wide(input)
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    batch = tuple(range(x.ndim - len(normalized_shape)))
    rstd = wide(rstd)
    y = (x - wide(mean)) * rstd
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        scaled = grad if weight is None else grad * wide(weight)
        grad_input = normalized_gradient(scaled, y, rstd, axes).astype(input.dtype)
    if output_mask[1] and weight is not None:
        grad_weight = (grad * y).sum(batch)
    if output_mask[2] and bias is not None:
        grad_bias = grad.sum(batch)
    return grad_input, grad_weight, grad_bias


@lowering(aten.native_group_norm.default)
def native_group_norm(input, weight, bias, N, C, HxW, group, eps):
    """Normalize over groups of channels; the result, and mean and 1 / standard deviation of shape ``[N, group]``."""
    x = wide(input).reshape(N, group, (C // group) * HxW)
    mean, var = moments(x, 2)
    rstd = lax.rsqrt(var + eps)
    out = ((x - mean) * rstd).reshape(N, C, HxW)
    if weight is not None:
        out = out * wide(weight).reshape(1, C, 1)
    if bias is not None:
        out = out + wide(bias).reshape(1, C, 1)
    return out.reshape(input.shape).astype(input.dtype), mean[..., 0], rstd[..., 0]


@lowering(aten.native_group_norm_backward.default)
def native_group_norm_backward(grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask):
    """Gradients of input, weight and bias."""
    grouped, channels = (N, group, (C // group) * HxW), (N, C, HxW)
    rstd = wide(rstd).reshape(N, group, 1)
    y = (wide(input).reshape(grouped) - wide(mean).reshape(N, group, 1)) * rstd
    grad = wide(grad_out).reshape(channels)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        scaled = grad if weight is None else grad * wide(weight).reshape(1, C, 1)
        grad_input = normalized_gradient(scaled.reshape(grouped), y, rstd, 2).reshape(input.shape).astype(input.dtype)
    if output_mask[1]:
        grad_weight = (grad * y.reshape(channels)).sum((0, 2))
    if output_mask[2]:
        grad_bias = grad.sum((0, 2))
    return grad_input, grad_weight, grad_bias


def _rms(input, normalized_shape, eps):
    x = wide(input)
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    # torch takes the epsilon of the type that it computes in
    eps = jnp.finfo(x.dtype).eps if eps is None else eps
    power = (jnp.square(x.real) + jnp.square(x.imag)) if jnp.iscomplexobj(x) else jnp.square(x)
    return x, axes, lax.rsqrt(power.mean(axes, keepdims=True) + eps)


@lowering(aten._fused_rms_norm.default)
def fused_rms_norm(input, normalized_shape, weight, eps):
    """Divide by the root of the mean square over the last dimensions; the result and the reciprocal root."""
    x, _, rstd = _rms(input, normalized_shape, eps)
    out = x * rstd
    return (out if weight is None else out * wide(weight)).astype(input.dtype), rstd


@lowering(aten._fused_rms_norm_backward.default)
def fused_rms_norm_backward(grad_out, input, normalized_shape, rstd, weight, output_mask):
    """Gradients of input and weight."""
    grad, x, rstd = wide(grad_out), wide(input), wide(rstd)
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    y = x * rstd
    grad_input = grad_weight = None
    if output_mask[0]:
        scaled = grad if weight is None else grad * wide(weight)
        grad_input = rstd * (scaled - y * (scaled * y).mean(axes, keepdims=True))
    if output_mask[1] and weight is not None:
        grad_weight = (grad * y).sum(tuple(range(x.ndim - len(normalized_shape))))
    return grad_input, grad_weight


@lowering(aten.renorm.default, static=("p",))
def renorm(self, p, dim, maxnorm):
    """Scale down the slices along `dim` whose p-norm is above `maxnorm`."""
    x = wide(self)
    dim %= x.ndim
    axes = tuple(i for i in range(x.ndim) if i != dim)
    magnitude = jnp.abs(x)
    if p == math.inf:
        norm = magnitude.max(axes, keepdims=True)
    elif p == 2:
        norm = jnp.sqrt(jnp.square(magnitude).sum(axes, keepdims=True))
    elif p == 1:
        norm = magnitude.sum(axes, keepdims=True)
    else:
        norm = (magnitude**p).sum(axes, keepdims=True) ** (1 / p)
    # the addend keeps torch's quotient finite
    scale = jnp.where(norm > maxnorm, maxnorm / (norm + 1e-7), 1)
    return (x * scale.astype(norm.dtype)).astype(self.dtype)


def _norm_except(v, dim):
    axes = tuple(i for i in range(v.ndim) if i != dim % v.ndim)
    return axes, jnp.sqrt(jnp.square(jnp.abs(v)).sum(axes, keepdims=True))


@lowering(aten._weight_norm_interface.default)
def weight_norm_interface(v, g, dim=0):
    """``v * g / norm(v)``, the norm over all dimensions but `dim`; the result and the norm."""
    x = wide(v)
    _, norm = _norm_except(x, dim)
    return (x * (wide(g) / norm)).astype(v.dtype), norm


@lowering(aten._weight_norm_interface_backward.default)
def weight_norm_interface_backward(grad_w, saved_v, saved_g, saved_norms, dim):
    """Gradients of v and g."""
    grad, v, g, norm = wide(grad_w), wide(saved_v), wide(saved_g), wide(saved_norms)
    axes = tuple(i for i in range(v.ndim) if i != dim % v.ndim)
    along = (grad * v).sum(axes, keepdims=True)
    return (g / norm) * (grad - v * (along / jnp.square(norm))), along / norm
