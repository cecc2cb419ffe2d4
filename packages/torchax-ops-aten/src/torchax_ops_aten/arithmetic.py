"""Arithmetic of two operands: add, sub, mul, the divisions and remainders, powers, extrema, and functions like atan2."""

import numbers

import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torchax.ops import aten, lowering, raise_if, table

from ._common import complex_log_add_exp, default_float, is_complex, is_float, is_inexact, wide


def _is(value, number) -> bool:
    """Whether a `Scalar` argument is compiled in and equals `number`."""
    return isinstance(value, numbers.Number) and value == number


def _operand(value, like):
    """A number as an array of the dtype of `like`; arrays as they are."""
    return jnp.asarray(value, like.dtype) if isinstance(value, numbers.Number) else value


def _pair(x, other):
    """Both operands as arrays of one dtype (either may be a number)."""
    if isinstance(x, numbers.Number):
        return jnp.asarray(x, other.dtype), other
    return x, _operand(other, x)


@lowering(aten.add.Tensor, aten.add.Scalar, promote="default")
def add(x, other, alpha=1):
    """x + alpha other; for bools, or."""
    return jnp.add(x, other if _is(alpha, 1) else jnp.multiply(other, alpha))


@lowering(aten.sub.Tensor, aten.sub.Scalar, promote="default")
def sub(x, other, alpha=1):
    """x - alpha other."""
    return jnp.subtract(x, other if _is(alpha, 1) else jnp.multiply(other, alpha))


@lowering(aten.rsub.Tensor, aten.rsub.Scalar, promote="default")
def rsub(x, other, alpha=1):
    """other - alpha x."""
    return jnp.subtract(other, x if _is(alpha, 1) else jnp.multiply(x, alpha))


@lowering(aten.div.Tensor, aten.div.Scalar, promote="int_to_float", exact=("other",))
def div(x, other):
    """x / other."""
    return jnp.true_divide(x, other)


@lowering(aten.div.Tensor_mode, aten.div.Scalar_mode, promote="keep", exact=("other",), checks=True)
def div_mode(x, other, *, rounding_mode=None):
    """x / other, then rounded towards zero ("trunc") or down ("floor")."""
    x, other = _pair(x, other)
    if rounding_mode == "floor":
        return floor_divide(wide(x), wide(other))
    if rounding_mode == "trunc" and not is_float(x):
        return _int_trunc(x, other)
    if not is_inexact(x):
        x, other = x.astype(default_float()), other.astype(default_float())
    if rounding_mode != "trunc":
        return wide(x) / wide(other)
    # CPU torch rounds a number, and the quotient before it truncates it, to 16 bits
    return jnp.trunc((wide(x) / wide(other.astype(x.dtype))).astype(x.dtype))


def _nonzero(divisor):
    """State that integers are not divided by zero."""
    if not is_inexact(divisor):
        raise_if(divisor == 0, RuntimeError, "ZeroDivisionError")


def _int_trunc(x, other):
    _nonzero(other)
    return lax.div(*jnp.broadcast_arrays(x, other))


@lowering(aten.floor_divide.default, aten.floor_divide.Scalar, promote="default", exact=("other",), checks=True)
def floor_divide(x, other):
    """Floor division as Python defines it (c10::div_floor_floating for floats)."""
    x, other = _pair(x, other)
    if not is_float(x):
        _nonzero(other)
        return jnp.floor_divide(x, other)
    x, other = jnp.broadcast_arrays(x, other)
    mod = lax.rem(x, other)
    quotient = (x - mod) / other
    quotient = jnp.where((mod != 0) & ((other < 0) != (mod < 0)), quotient - 1, quotient)
    floored = jnp.floor(quotient)
    floored = jnp.where(quotient - floored > 0.5, floored + 1, floored)
    result = jnp.where(quotient != 0, floored, jnp.copysign(jnp.zeros_like(x), x / other))
    return jnp.where(other == 0, x / other, result)


@lowering(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor, promote="default", checks=True)
def remainder(x, other):
    """x modulo other, with the sign of other."""
    x, other = jnp.broadcast_arrays(*_pair(x, other))
    if x.dtype == np.bool_:
        return x & ~other
    _nonzero(other)
    mod = lax.rem(x, other)
    return jnp.where((mod != 0) & ((other < 0) != (mod < 0)), mod + other, mod)


@lowering(aten.fmod.Tensor, aten.fmod.Scalar, promote="default", checks=True)
def fmod(x, other):
    """x modulo other, with the sign of x."""
    x, other = _pair(x, other)
    _nonzero(other)
    return lax.rem(*jnp.broadcast_arrays(x, other))


_POWERS = {0.0: jnp.ones_like, 1.0: lambda x: x, 2.0: lambda x: x * x, 3.0: lambda x: x * x * x}
_INEXACT_POWERS = {
    0.5: jnp.sqrt,
    -0.5: lambda x: 1 / jnp.sqrt(x),
    -1.0: lambda x: 1 / x,
    -2.0: lambda x: 1 / (x * x),
}


@lowering(aten.pow.Tensor_Scalar, promote="default", specialize={"exponent": (*_POWERS, *_INEXACT_POWERS)})
def pow_scalar(x, exponent):
    """x ** exponent."""
    if isinstance(exponent, complex) and not exponent.imag:
        exponent = exponent.real
    if isinstance(exponent, (int, float)):
        short = _POWERS.get(exponent) or (_INEXACT_POWERS.get(exponent) if is_inexact(x) else None)
        if short is not None:
            return short(x)
    return power(x, exponent)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@lowering(aten.pow.Tensor_Scalar, promote="default", dtypes=_INTEGERS, priority=1, checks=True)
def pow_of_integers(x, exponent):
    """x ** exponent, where x may have been promoted by the exponent; integers have no negative powers."""
    if not is_inexact(x):
        if not isinstance(exponent, int):
            raise_if(exponent < 0, RuntimeError, "Integers to negative integer powers are not allowed.")
        elif exponent < 0:
            raise ValueError(f"integers to the power {exponent}")  # torch words it
    return pow_scalar(x, exponent)


@lowering(aten.pow.Tensor_Tensor, aten.pow.Scalar, promote="default")
def power(x, exponent):
    """x ** exponent; integers to a negative power are 0, but for 1 and -1."""
    x, exponent = jnp.broadcast_arrays(*_pair(x, exponent))
    if is_complex(x):
        return _complex_power(x, exponent)
    if is_float(x):
        return lax.pow(x, exponent)
    if x.dtype == np.bool_:
        return x | ~exponent
    result = _integer_power(x, exponent)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return result
    inverse = jnp.where(x == 1, 1, jnp.where(x == -1, jnp.where(exponent % 2 == 0, 1, -1), 0)).astype(x.dtype)
    return jnp.where(exponent < 0, inverse, result)


def _integer_power(x, exponent):
    """Square and multiply over the bits of the exponent."""
    result = jnp.ones_like(x)
    for bit in range(8 * x.dtype.itemsize - 1 + (not jnp.issubdtype(x.dtype, jnp.signedinteger))):
        result = jnp.where((exponent >> bit) & 1 != 0, result * x, result)
        x = x * x
    return result


def _complex_power(x, exponent):
    """exp(exponent log x), with 0 ** 0 == 1 and 0 elsewhere at 0."""
    zero = x == 0
    result = jnp.exp(exponent * jnp.log(jnp.where(zero, 1, x)))
    return jnp.where(zero, jnp.where(exponent == 0, 1, jnp.where(exponent.real > 0, 0, jnp.nan)), result)


@lowering(aten.copysign.Tensor, aten.copysign.Scalar, promote="int_to_float")
def copysign(x, other):
    """The magnitude of x with the sign of other."""
    return jnp.copysign(x, other)


@lowering(aten.heaviside.default)
def heaviside(x, values):
    """0, values or 1 where x is negative, zero or positive; NaN counts as negative."""
    return jnp.where(x == 0, values, (x > 0).astype(x.dtype))


@lowering(aten.hypot.default, promote="default")
def hypot(x, other):
    """sqrt(x**2 + other**2) without overflow."""
    return jnp.hypot(x, other)


@lowering(aten.logaddexp.default, promote="default")
def logaddexp(x, other):
    """log(exp(x) + exp(other))."""
    return complex_log_add_exp(x, other) if is_complex(x) else jnp.logaddexp(x, other)


@lowering(aten.logaddexp2.default, promote="default")
def logaddexp2(x, other):
    """log2(2**x + 2**other)."""
    return jnp.logaddexp2(x, other)


@lowering(aten.ldexp.Tensor, promote="int_to_float", exact=("other",))
def ldexp(x, other):
    """x 2**other."""
    return x * jnp.exp2(other)


@lowering(aten.nextafter.default, promote="keep")
def nextafter(x, other):
    """The next number after x in the direction of other."""
    return jnp.nextafter(x, other)


PRODUCT = table({"mul": jnp.multiply}, overloads=("Tensor", "Scalar"), promote="default", exact=("other",))
EXTREMA = table({"maximum": jnp.maximum, "minimum": jnp.minimum, "fmax": jnp.fmax, "fmin": jnp.fmin}, promote="keep")
ANGLES = table({"atan2": jnp.arctan2}, promote="int_to_float")
DIVISORS = table({"gcd": jnp.gcd, "lcm": jnp.lcm}, promote="keep")
