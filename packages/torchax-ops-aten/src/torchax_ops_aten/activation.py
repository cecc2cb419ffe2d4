"""Activation functions and their backwards; softmax."""

import math

import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering

from ._common import is_complex, lift


@lowering(aten.relu.default, promote="keep")
def relu(x):
    """max(x, 0)."""
    return jnp.maximum(x, 0)


@lowering(aten.threshold.default, promote="keep")
def threshold_(x, threshold, value):
    """x above the threshold, else value."""
    return jnp.where(x <= threshold, value, x)


@lowering(aten.threshold_backward.default, promote="keep", promote_only=("grad_output", "self"))
def threshold_backward(grad, x, threshold):
    """The gradient where x is above the threshold."""
    return jnp.where(x <= threshold, 0, grad)


@lowering(aten.hardtanh.default, promote="keep")
def hardtanh(x, min_val=-1, max_val=1):
    """x clamped to [min_val, max_val]."""
    return jnp.minimum(jnp.maximum(x, min_val), max_val)


@lowering(aten.hardtanh_backward.default, promote="keep")
def hardtanh_backward(grad, x, min_val, max_val):
    """The gradient strictly inside of the interval."""
    return jnp.where((x <= min_val) | (x >= max_val), 0, grad)


@lowering(aten.gelu.default, promote="default")
def gelu(x, *, approximate="none"):
    """x Phi(x), or its approximation by tanh (Hendrycks and Gimpel, 2016)."""
    if approximate == "tanh":
        return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


@lowering(aten.gelu_backward.default, promote="default")
def gelu_backward(grad, x, *, approximate="none"):
    """grad times the derivative of gelu."""
    if approximate == "tanh":
        tanh = jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
        inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        return grad * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner)
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)
    return grad * (0.5 * (1 + lax.erf(x * math.sqrt(0.5))) + x * density)


@lowering(aten.silu.default, promote="default")
def silu(x):
    """x sigmoid(x)."""
    return x / (1 + jnp.exp(-x))


@lowering(aten.silu_backward.default, promote="default", whole=True)
def silu_backward(grad, x):
    """grad times the derivative of silu."""
    sigmoid = lax.logistic(x)
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def _softplus(x):
    return jnp.log1p(jnp.exp(x))


@lowering(aten.mish.default, promote="default")
def mish(x):
    """x tanh(softplus(x))."""
    return x * jnp.tanh(_softplus(x))


@lowering(aten.mish_backward.default, promote="default", whole=True)
def mish_backward(grad, x):
    """grad times the derivative of mish."""
    tanh = jnp.tanh(_softplus(x))
    return grad * (tanh + x * lax.logistic(x) * (1 - tanh * tanh))


@lowering(aten.softplus.default, promote="default", exact=("beta", "threshold"))
def softplus(x, beta=1, threshold=20):
    """log(1 + exp(beta x)) / beta, linear above the threshold."""
    return jnp.where(x * beta > threshold, x, _softplus(x * beta) / beta)


@lowering(aten.softplus_backward.default, promote="default", exact=("beta", "threshold"))
def softplus_backward(grad, x, beta, threshold):
    """grad sigmoid(beta x), grad above the threshold."""
    return jnp.where(x * beta > threshold, grad, grad * lax.logistic(x * beta))


@lowering(aten.elu.default, promote="default", exact=("alpha", "scale", "input_scale"))
def elu(x, alpha=1, scale=1, input_scale=1):
    """scale x above 0, alpha scale expm1(input_scale x) below."""
    return jnp.where(x > 0, x * scale, jnp.expm1(x * input_scale) * (alpha * scale))


@lowering(aten.elu_backward.default, promote="default", exact=("alpha", "scale", "input_scale"))
def elu_backward(grad, alpha, scale, input_scale, is_result, x):
    """The gradient of elu, from its argument or its result."""
    if is_result:
        return jnp.where(x <= 0, grad * input_scale * (x + alpha * scale), grad * scale)
    return jnp.where(x <= 0, grad * input_scale * alpha * scale * jnp.exp(x * input_scale), grad * scale)


@lowering(aten.celu.default, promote="default", exact=("alpha",))
def celu(x, alpha=1.0):
    """x above 0, alpha expm1(x / alpha) below."""
    return jnp.where(x > 0, x, alpha * jnp.expm1(x / alpha))


@lowering(aten.leaky_relu.default, promote="default", exact=("negative_slope",))
def leaky_relu(x, negative_slope=0.01):
    """x above 0, negative_slope x below."""
    return jnp.where(x > 0, x, x * negative_slope)


@lowering(aten.leaky_relu_backward.default, promote="default", exact=("negative_slope",))
def leaky_relu_backward(grad, x, negative_slope, self_is_result):
    """grad above 0, negative_slope grad below."""
    return jnp.where(x > 0, grad, grad * negative_slope)


@lowering(aten._prelu_kernel.default, promote="default")
def prelu(x, weight):
    """x above 0, weight x below; the weight broadcasts."""
    return jnp.where(x > 0, x, weight * x)


@lowering(aten._prelu_kernel_backward.default, promote="default")
def prelu_backward(grad, x, weight):
    """Gradients of prelu for x and for the weight (as large as x)."""
    return jnp.where(x > 0, grad, weight * grad), jnp.where(x > 0, 0, x * grad)


@lowering(aten.hardswish.default, promote="default")
def hardswish(x):
    """x relu6(x + 3) / 6."""
    return x * jnp.minimum(jnp.maximum(x + 3, 0), 6) / 6


@lowering(aten.hardswish_backward.default, promote="default")
def hardswish_backward(grad, x):
    """0, grad (x / 3 + 1 / 2), grad in the three pieces."""
    return jnp.where(x <= -3, 0, jnp.where(x < 3, grad * (x / 3 + 0.5), grad))


@lowering(aten.hardsigmoid.default, promote="default")
def hardsigmoid(x):
    """relu6(x + 3) / 6."""
    return jnp.minimum(jnp.maximum(x + 3, 0), 6) / 6


@lowering(aten.hardsigmoid_backward.default, promote="default")
def hardsigmoid_backward(grad, x):
    """grad / 6 in (-3, 3)."""
    return jnp.where((x > -3) & (x < 3), grad / 6, 0)


@lowering(aten.hardshrink.default, promote="default")
def hardshrink(x, lambd=0.5):
    """x outside of [-lambd, lambd], else 0; NaN stays."""
    return jnp.where((x >= -lambd) & (x <= lambd), 0, x)


@lowering(aten.softshrink.default, promote="default", exact=("lambd",))
def softshrink(x, lambd=0.5):
    """x moved towards 0 by lambd; NaN stays."""
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, x * 0))


@lowering(aten.hardshrink_backward.default, aten.softshrink_backward.default, promote="default")
def shrink_backward(grad, x, lambd):
    """The gradient outside of [-lambd, lambd]."""
    return jnp.where((x >= -lambd) & (x <= lambd), 0, grad)


@lowering(aten.glu.default, promote="default")
def glu(x, dim=-1):
    """a sigmoid(b) for the two halves of x."""
    a, b = jnp.split(x, 2, dim)
    return a * lax.logistic(b)


@lowering(aten.glu_backward.default, promote="default")
def glu_backward(grad, x, dim):
    """The gradient of glu."""
    a, b = jnp.split(x, 2, dim)
    sigmoid = lax.logistic(b)
    return jnp.concatenate([grad * sigmoid, grad * a * sigmoid * (1 - sigmoid)], dim)


@lowering(aten.log_sigmoid_forward.default, promote="default")
def log_sigmoid(x):
    """log(sigmoid(x)) and the buffer exp(-|x|) that CPU torch keeps for the backward."""
    z = jnp.exp(-jnp.abs(x))
    return jnp.minimum(x, 0) - jnp.log1p(z), z


@lowering(aten.log_sigmoid_backward.default, promote="default", promote_only=("grad_output", "self"))
def log_sigmoid_backward(grad, x, buffer):
    """grad sigmoid(-x)."""
    return grad * lax.logistic(-x)


@lowering(aten.tanh_backward.default, promote="default")
def tanh_backward(grad, y):
    """grad (1 - y**2), conjugated."""
    return grad * _conj(1 - y * y)


@lowering(aten.sigmoid_backward.default, promote="default")
def sigmoid_backward(grad, y):
    """grad y (1 - y), conjugated."""
    return grad * _conj((1 - y) * y)


def _conj(x):
    return jnp.conj(x) if is_complex(x) else x


def _exponentials(x, dim):
    """x less its maximum along dim, and the exponentials of that."""
    shifted = x - jnp.max(x, axis=dim, keepdims=True)
    return shifted, jnp.exp(shifted)


@lowering(aten._softmax.default, promote="default")
def softmax(x, dim, half_to_float):
    """exp(x) / sum(exp(x)) along dim; a row of -inf gives NaN."""
    if x.size == 0:
        return x
    y, dim = lift(x, dim)
    _, e = _exponentials(y, dim)
    return (e / jnp.sum(e, axis=dim, keepdims=True)).reshape(x.shape)


@lowering(aten._safe_softmax.default, promote="default")
def safe_softmax(x, dim, dtype=None):
    """softmax, where a row of -inf gives zeros."""
    masked = jnp.all(x == -jnp.inf, axis=dim, keepdims=True)
    return jnp.where(masked, 0, softmax(x, dim, False))


@lowering(aten._log_softmax.default, promote="default")
def log_softmax(x, dim, half_to_float):
    """x - log(sum(exp(x))) along dim."""
    if x.size == 0:
        return x
    y, dim = lift(x, dim)
    shifted, e = _exponentials(y, dim)
    return (shifted - jnp.log(jnp.sum(e, axis=dim, keepdims=True))).reshape(x.shape)


@lowering(aten._softmax_backward_data.default, promote="default")
def softmax_backward(grad, output, dim, input_dtype):
    """output (grad - sum(grad output))."""
    if output.ndim == 0:
        return output * (grad - grad * output)
    product = grad * output
    return product - output * jnp.sum(product, axis=dim, keepdims=True)


@lowering(aten._log_softmax_backward_data.default, promote="default")
def log_softmax_backward(grad, output, dim, input_dtype):
    """grad - exp(output) sum(grad)."""
    if output.ndim == 0:
        return grad - jnp.exp(output) * grad
    return grad - jnp.exp(output) * jnp.sum(grad, axis=dim, keepdims=True)


@lowering(aten.glu_jvp.default, promote="default")
def glu_jvp(glu, x, dx, dim):
    """The tangent of glu, from its result and the tangent of its argument."""
    (_, b), (da, db) = jnp.split(x, 2, dim), jnp.split(dx, 2, dim)
    sigmoid = lax.logistic(b)
    return da * sigmoid + glu * (1 - sigmoid) * db
