"""Special functions: gamma, zeta and normal distribution functions, entropies."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import log_ndtr, ndtri
from jax.scipy.special import zeta as positive_zeta
from torchax.ops import aten, lowering, table


@lowering(aten.lgamma.default, promote="int_to_float")
def lgamma(x):
    """log(|gamma(x)|)."""
    return lax.lgamma(x)


@lowering(aten.digamma.default, promote="int_to_float")
def digamma(x):
    """The derivative of lgamma; -inf at 0, inf at -0, NaN at negative integers. Reflected below 0, with an exact fraction."""
    low = x < 0
    result = lax.digamma(jnp.where(low, 1 - x, x)) - jnp.where(low, math.pi / jnp.tan(math.pi * (x - jnp.round(x))), 0)
    result = jnp.where(low & (x == jnp.round(x)), jnp.nan, result)
    return jnp.where(x == 0, jnp.copysign(jnp.asarray(jnp.inf, x.dtype), -x), result)


@lowering(aten.polygamma.default, promote="int_to_float")
def polygamma(n, x):
    """The n-th derivative of digamma."""
    if n == 0:
        return digamma(x)
    if n == 1:
        # reflection: trigamma(x) = (pi / sin(pi x))**2 - trigamma(1 - x)
        low = x < 0.5
        upper = positive_zeta(jnp.full_like(x, 2), jnp.where(low, 1 - x, x))
        return jnp.where(low, (math.pi / jnp.sin(math.pi * x)) ** 2 - upper, upper)
    sign = 1.0 if n % 2 else -1.0
    factorial = float(math.factorial(n)) if n <= 170 else math.inf
    return sign * factorial * _zeta(jnp.full_like(x, n + 1), x)


@lowering(
    aten.special_zeta.default, aten.special_zeta.self_scalar, aten.special_zeta.other_scalar, promote="int_to_float"
)
def hurwitz_zeta(x, other):
    """The Hurwitz zeta function: the sum of (k + other)**-x."""
    return _zeta(*jnp.broadcast_arrays(x, other))


_FARTHEST = (
    4096  # terms of the series for a negative `q` that are summed; what is left out is below float32's precision
)


def _zeta(x, q):
    """JAX's zeta for positive q; from a q below 0 the terms are added one by one up to 9, as Cephes does.

    The rounding errors of these sums are carried along: terms on both sides of 0 nearly cancel.
    """
    whole = jnp.floor(q)
    start = jnp.where(q < -_FARTHEST, q - whole - _FARTHEST, q)
    end = jnp.where(q > 0, 0, 9).astype(q.dtype)

    def add_term(state):
        total, rest, a = state
        more = a <= end
        term = jnp.abs(a) ** -x * jnp.where((x % 2 == 1) & (a < 0), -1, 1).astype(x.dtype)
        term = jnp.where(more, term, 0)
        new = total + term
        other = new - total  # Knuth's two-sum
        rest = rest + ((total - (new - other)) + (term - other))
        return new, rest, jnp.where(more, a + 1, a)

    zeros = jnp.zeros_like(start)
    total, rest, a = lax.while_loop(lambda state: jnp.any(state[2] <= end), add_term, (zeros, zeros, start))
    result = total + (rest + positive_zeta(x, a))
    result = jnp.where((q <= 0) & (x != jnp.floor(x)), jnp.nan, result)
    result = jnp.where((q <= 0) & (q == whole), jnp.inf, result)
    return jnp.where(x == 1, jnp.inf, jnp.where(x < 1, jnp.nan, result))


@lowering(aten.igamma.default, promote="int_to_float")
def igamma(x, other):
    """The regularized lower incomplete gamma function."""
    return lax.igamma(*jnp.broadcast_arrays(x, other))


@lowering(aten.igammac.default, promote="int_to_float")
def igammac(x, other):
    """The regularized upper incomplete gamma function."""
    return lax.igammac(*jnp.broadcast_arrays(x, other))


@lowering(aten.special_erfcx.default, promote="int_to_float")
def erfcx(x):
    """exp(x**2) erfc(x); its continued fraction where erfc would underflow."""
    split = 8.0 if x.dtype == np.float32 else 24.0
    small = jnp.minimum(jnp.abs(x), split)
    # exp(x**2) without the rounding error of the square, which the exponential would magnify
    high = jnp.round(small * 64) / 64
    inner = jnp.exp(high * high) * jnp.exp((small - high) * (small + high)) * lax.erfc(small)
    large = jnp.maximum(jnp.abs(x), split)
    fraction = large
    for k in range(8, 0, -1):
        fraction = large + 0.5 * k / fraction
    positive = jnp.where(jnp.abs(x) < split, inner, 1 / (math.sqrt(math.pi) * fraction))
    return jnp.where(x < 0, 2 * jnp.exp(x * x) - positive, positive)


@lowering(aten.special_entr.default, promote="int_to_float")
def entr(x):
    """-x log(x); 0 at 0, -inf below."""
    positive = x > 0
    return jnp.where(
        positive, -x * jnp.log(jnp.where(positive, x, 1)), jnp.where(x == 0, 0, jnp.where(x < 0, -jnp.inf, x))
    )


def _x_times(fn):
    """x fn(y), 0 where x is 0 and y is a number."""

    def product(x, y):
        x, y = jnp.broadcast_arrays(x, y)
        return jnp.where(jnp.isnan(y), y, jnp.where(x == 0, 0, x * fn(y)))

    return product


XLOGY = table({"xlogy": _x_times(jnp.log)}, overloads=("Tensor", "Scalar_Self", "Scalar_Other"), promote="int_to_float")
XLOG1PY = table(
    {"special_xlog1py": _x_times(jnp.log1p)},
    overloads=("default", "self_scalar", "other_scalar"),
    promote="int_to_float",
)
NORMAL = table({"special_ndtri": ndtri, "special_log_ndtr": log_ndtr}, promote="int_to_float")
