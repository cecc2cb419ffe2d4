"""Orthogonal polynomials, by their three-term recurrences (and closed forms where torch takes those)."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering


def _degree(n):
    """The degree as an integer; what is no number counts as negative."""
    return jnp.where(jnp.isfinite(n), n, -1).astype(np.int32)


def _recurrence(x, n, first, step):
    """The polynomial of degree n at x: 1, `first`, then ``step(k, last, one before)`` for k = 2, 3, ..., n."""
    x, n = jnp.broadcast_arrays(x, n)

    def advance(k, pair):
        p, q = pair
        go = k <= n
        return jnp.where(go, q, p), jnp.where(go, step(k, q, p), q)

    top = jnp.max(n, initial=1)
    _, q = lax.fori_loop(np.int32(2), top + 1, advance, (jnp.ones_like(x), first))
    return jnp.where(n < 0, 0, jnp.where(n == 0, 1, q)).astype(x.dtype)


def _chebyshev(x, n, first, closed, above):
    """T, U, V or W; above degree `above` the closed form in acos(x) serves |x| < 1."""
    x, n = jnp.broadcast_arrays(x, _degree(n))
    inside = (n > above) & (jnp.abs(x) < 1)
    result = _recurrence(x, jnp.where(inside, 0, n), first(x), lambda k, q, p: 2 * x * q - p)
    angle = jnp.arccos(jnp.where(inside, x, 0))
    return jnp.where(inside, closed(n.astype(x.dtype), angle), result)


def _kind_t(x, n, above=6):
    return _chebyshev(x, n, lambda x: x, lambda n, a: jnp.cos(n * a), above)


def _kind_u(x, n, above=8):
    return _chebyshev(x, n, lambda x: 2 * x, lambda n, a: jnp.sin((n + 1) * a) / jnp.sin(a), above)


def _kind_v(x, n, above=8):
    return _chebyshev(x, n, lambda x: 2 * x - 1, lambda n, a: jnp.cos((n + 0.5) * a) / jnp.cos(a / 2), above)


def _kind_w(x, n, above=8):
    return _chebyshev(x, n, lambda x: 2 * x + 1, lambda n, a: jnp.sin((n + 0.5) * a) / jnp.sin(a / 2), above)


@lowering(
    aten.special_chebyshev_polynomial_t.default, aten.special_chebyshev_polynomial_t.n_scalar,
    aten.special_chebyshev_polynomial_t.x_scalar, promote="int_to_float",
)  # fmt: skip
def chebyshev_t(x, n):
    """T_n(x)."""
    return _kind_t(x, n)


@lowering(
    aten.special_chebyshev_polynomial_u.default, aten.special_chebyshev_polynomial_u.n_scalar,
    aten.special_chebyshev_polynomial_u.x_scalar, promote="int_to_float",
)  # fmt: skip
def chebyshev_u(x, n):
    """U_n(x)."""
    return _kind_u(x, n)


@lowering(
    aten.special_chebyshev_polynomial_v.default, aten.special_chebyshev_polynomial_v.n_scalar,
    aten.special_chebyshev_polynomial_v.x_scalar, promote="int_to_float",
)  # fmt: skip
def chebyshev_v(x, n):
    """V_n(x)."""
    return _kind_v(x, n)


@lowering(
    aten.special_chebyshev_polynomial_w.default, aten.special_chebyshev_polynomial_w.n_scalar,
    aten.special_chebyshev_polynomial_w.x_scalar, promote="int_to_float",
)  # fmt: skip
def chebyshev_w(x, n):
    """W_n(x)."""
    return _kind_w(x, n)


@lowering(
    aten.special_shifted_chebyshev_polynomial_t.default, aten.special_shifted_chebyshev_polynomial_t.n_scalar,
    aten.special_shifted_chebyshev_polynomial_t.x_scalar, promote="int_to_float",
)  # fmt: skip
def shifted_chebyshev_t(x, n):
    """T_n(2 x - 1)."""
    return _kind_t(2 * x - 1, n)


@lowering(
    aten.special_shifted_chebyshev_polynomial_u.default, aten.special_shifted_chebyshev_polynomial_u.n_scalar,
    aten.special_shifted_chebyshev_polynomial_u.x_scalar, promote="int_to_float",
)  # fmt: skip
def shifted_chebyshev_u(x, n):
    """U_n(2 x - 1)."""
    return _kind_u(2 * x - 1, n, 6)


@lowering(
    aten.special_shifted_chebyshev_polynomial_v.default, aten.special_shifted_chebyshev_polynomial_v.n_scalar,
    aten.special_shifted_chebyshev_polynomial_v.x_scalar, promote="int_to_float",
)  # fmt: skip
def shifted_chebyshev_v(x, n):
    """V_n(2 x - 1)."""
    return _kind_v(2 * x - 1, n, 6)


@lowering(
    aten.special_shifted_chebyshev_polynomial_w.default, aten.special_shifted_chebyshev_polynomial_w.n_scalar,
    aten.special_shifted_chebyshev_polynomial_w.x_scalar, promote="int_to_float",
)  # fmt: skip
def shifted_chebyshev_w(x, n):
    """W_n(2 x - 1)."""
    return _kind_w(2 * x - 1, n, 4)


def _hermite(x, n, factor):
    """H (factor 2) and He (factor 1); NaN above the degree at which torch gives up."""
    n = _degree(n)
    result = _recurrence(x, n, factor * jnp.broadcast_arrays(x, n)[0], lambda k, q, p: factor * (x * q - (k - 1) * p))
    return jnp.where(n > (512 if result.dtype == np.float64 else 128), jnp.nan, result)


@lowering(
    aten.special_hermite_polynomial_h.default, aten.special_hermite_polynomial_h.n_scalar,
    aten.special_hermite_polynomial_h.x_scalar, promote="int_to_float",
)  # fmt: skip
def hermite_h(x, n):
    """The physicists' Hermite polynomial."""
    return _hermite(x, n, 2)


@lowering(
    aten.special_hermite_polynomial_he.default, aten.special_hermite_polynomial_he.n_scalar,
    aten.special_hermite_polynomial_he.x_scalar, promote="int_to_float",
)  # fmt: skip
def hermite_he(x, n):
    """The probabilists' Hermite polynomial."""
    return _hermite(x, n, 1)


@lowering(
    aten.special_laguerre_polynomial_l.default, aten.special_laguerre_polynomial_l.n_scalar,
    aten.special_laguerre_polynomial_l.x_scalar, promote="int_to_float",
)  # fmt: skip
def laguerre(x, n):
    """L_n(x)."""
    x, n = jnp.broadcast_arrays(x, _degree(n))
    return _recurrence(x, n, 1 - x, lambda k, q, p: ((2 * k - 1 - x) * q - (k - 1) * p) / k)


@lowering(
    aten.special_legendre_polynomial_p.default, aten.special_legendre_polynomial_p.n_scalar,
    aten.special_legendre_polynomial_p.x_scalar, promote="int_to_float",
)  # fmt: skip
def legendre(x, n):
    """P_n(x)."""
    x, n = jnp.broadcast_arrays(x, _degree(n))
    return _recurrence(x, n, x, lambda k, q, p: ((2 * k - 1) * x * q - (k - 1) * p) / k)
