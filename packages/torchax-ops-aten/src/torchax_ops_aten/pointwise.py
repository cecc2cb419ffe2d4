"""Pointwise functions of one tensor, and the ternary ones: elementary functions, rounding, clamp, where, lerp."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering, table

from ._common import cast, interpolate, is_complex, is_float, is_inexact


def _sign(x):
    return x if x.dtype == np.bool_ else (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)


def _sgn(x):
    if not is_complex(x):
        return _sign(x)
    size = jnp.abs(x)
    return jnp.where(size == 0, 0, x / jnp.where(size == 0, 1, size))


def _absolute(x):
    return x if x.dtype == np.bool_ else jnp.abs(x)


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x)) if is_complex(x) else lax.logistic(x)


def _whole(fn):
    """`fn` for floats; integers are whole already."""
    return lambda x: fn(x) if is_float(x) else x


def _reciprocal(x):
    return 1 / x


FLOAT = table(
    {
        "acos": jnp.arccos, "acosh": jnp.arccosh, "asin": jnp.arcsin, "asinh": jnp.arcsinh, "atan": jnp.arctan,
        "atanh": jnp.arctanh, "cos": jnp.cos, "cosh": jnp.cosh, "sin": jnp.sin, "sinh": jnp.sinh, "tan": jnp.tan,
        "tanh": jnp.tanh, "exp": jnp.exp, "exp2": jnp.exp2, "expm1": jnp.expm1, "log": jnp.log, "log10": jnp.log10,
        "log1p": jnp.log1p, "log2": jnp.log2, "sqrt": jnp.sqrt, "rsqrt": lax.rsqrt, "reciprocal": _reciprocal,
        "sigmoid": _sigmoid, "erf": lax.erf, "erfc": lax.erfc, "erfinv": lax.erf_inv, "deg2rad": jnp.deg2rad,
        "rad2deg": jnp.rad2deg,
    },
    promote="int_to_float",
)  # fmt: skip
SAME = table(
    {
        "neg": jnp.negative, "sign": _sign, "sgn": _sgn,
        "ceil": _whole(jnp.ceil), "floor": _whole(jnp.floor), "round": _whole(jnp.round), "trunc": _whole(jnp.trunc),
        "frac": lambda x: x - jnp.trunc(x),
    },
    promote="keep",
)  # fmt: skip
REAL = table({"abs": _absolute}, promote="complex_to_float")
TESTS = table(
    {
        "isnan": lambda x: jnp.isnan(x) if is_inexact(x) else jnp.zeros(x.shape, np.bool_),
        "isinf": lambda x: jnp.isinf(x) if is_inexact(x) else jnp.zeros(x.shape, np.bool_),
        "isposinf": lambda x: x == jnp.inf if is_float(x) else jnp.zeros(x.shape, np.bool_),
        "isneginf": lambda x: x == -jnp.inf if is_float(x) else jnp.zeros(x.shape, np.bool_),
        "signbit": lambda x: jnp.signbit(x) if is_float(x) else x < 0 if x.dtype != np.bool_ else ~x & x,
    }
)


@lowering(aten.round.decimals, promote="keep")
def round_decimals(x, *, decimals):
    """Round half to even at 10**-decimals."""
    if not is_float(x):
        return x
    # scaled in the tensor's own dtype, as CPU torch does
    scale = jnp.asarray(10.0 ** abs(decimals), x.dtype)
    if decimals >= 0:
        return jnp.round(x * scale) / scale
    return jnp.round(x / scale) * scale


@lowering(aten.logit.default, promote="int_to_float")
def logit(x, eps=None):
    """log(x / (1 - x)), x clamped to [eps, 1 - eps]."""
    if eps is not None:
        low = jnp.asarray(eps, x.dtype)
        x = jnp.where(x < low, low, jnp.where(x > 1 - low, 1 - low, x))
    return jnp.log(x / (1 - x))


@lowering(aten.logit_backward.default, promote="default")
def logit_backward(grad, x, eps=None):
    """grad / (x (1 - x)); 0 where the clamp was active, NaN outside of [0, 1] without clamp."""
    low, outside = (0.0, jnp.nan) if eps is None else (eps, 0.0)
    return jnp.where((x < low) | (x > 1.0 - low), outside, grad / (x * (1 - x)))


@lowering(aten.sinc.default, promote="int_to_float")
def sinc(x):
    """sin(pi x) / (pi x)."""
    y = x * math.pi
    zero = x == 0
    return jnp.where(zero, 1, jnp.sin(y) / jnp.where(zero, 1, y))


@lowering(aten.frexp.Tensor)
def frexp(x):
    """Mantissa in [0.5, 1) and int32 exponent; infinities and NaN are their own mantissa."""
    y = x.astype(np.float32) if x.dtype.itemsize < 4 else x
    mantissa, exponent = jnp.frexp(y)
    finite = jnp.isfinite(y)
    return jnp.where(finite, mantissa, y), jnp.where(finite, exponent, 0)


@lowering(aten.nan_to_num.default)
def nan_to_num(x, nan=None, posinf=None, neginf=None):
    """Replace NaN and infinities; by default with 0 and the largest finite numbers."""
    if not is_inexact(x):
        return x
    if is_complex(x):
        return lax.complex(nan_to_num(x.real, nan, posinf, neginf), nan_to_num(x.imag, nan, posinf, neginf))
    info = jnp.finfo(x.dtype)
    y = jnp.where(jnp.isnan(x), jnp.asarray(nan or 0.0, x.dtype), x)
    y = jnp.where(x == jnp.inf, jnp.asarray(info.max if posinf is None else posinf, x.dtype), y)
    return jnp.where(x == -jnp.inf, jnp.asarray(info.min if neginf is None else neginf, x.dtype), y)


@lowering(aten.clamp.default, aten.clamp.Tensor, promote="keep")
def clamp(x, min=None, max=None):
    """minimum(maximum(x, min), max): NaN in any operand gives NaN, and max wins over min."""
    if min is not None:
        x = jnp.maximum(x, min)
    return x if max is None else jnp.minimum(x, max)


@lowering(aten.clamp_min.default, aten.clamp_min.Tensor, promote="keep")
def clamp_min(x, min):
    """maximum(x, min)."""
    return jnp.maximum(x, min)


@lowering(aten.clamp_max.default, aten.clamp_max.Tensor, promote="keep")
def clamp_max(x, max):
    """minimum(x, max)."""
    return jnp.minimum(x, max)


@lowering(aten.where.self, promote="keep", promote_only=("self", "other"))
def where(condition, x, other):
    """x where the condition holds (is nonzero), else other."""
    return jnp.where(condition.astype(np.bool_), x, other)


@lowering(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(x, mask, value):
    """`value`, cast to the dtype of x, where the mask is set."""
    return jnp.where(mask.astype(np.bool_), cast(value, x.dtype), x)


@lowering(aten.lerp.Scalar, aten.lerp.Tensor, promote="default", exact=("weight",))
def lerp(x, end, weight):
    """x + weight (end - x), computed from the nearer end."""
    return interpolate(x, end, weight)


@lowering(aten.addcmul.default, promote="default", exact=("value",))
def addcmul(x, tensor1, tensor2, *, value=1):
    """x + value tensor1 tensor2."""
    if isinstance(value, (int, float)) and value == 1:
        return x + tensor1 * tensor2
    return x + value * tensor1 * tensor2


@lowering(aten.addcdiv.default, promote="int_to_float", exact=("value",))
def addcdiv(x, tensor1, tensor2, *, value=1):
    """x + value tensor1 / tensor2."""
    if isinstance(value, (int, float)) and value == 1:
        return x + tensor1 / tensor2
    return x + value * tensor1 / tensor2
