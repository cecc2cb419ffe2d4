"""Eigenvalues, singular values, QR, least squares and functions of matrices."""

import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering

from ._common import wide
from .linalg import mH


def _real(dtype):
    return jnp.finfo(dtype).dtype


@lowering(aten._linalg_svd.default)
def linalg_svd(A, full_matrices=False, compute_uv=True, *, driver=None):
    """Singular value decomposition; U and Vh are empty unless `compute_uv`."""
    rows, columns = A.shape[-2:]
    size = min(rows, columns)
    batch = A.shape[:-2]
    if A.size == 0:
        s = jnp.zeros((*batch, size), _real(A.dtype))
        if not compute_uv:
            return jnp.zeros((0,), A.dtype), s, jnp.zeros((0,), A.dtype)
        wide, tall = (columns, rows) if full_matrices else (size, size)
        u, vh = (
            jnp.broadcast_to(jnp.eye(m, n, dtype=A.dtype), (*batch, m, n)) for m, n in ((rows, tall), (wide, columns))
        )
        return u, s, vh
    if not compute_uv:
        return jnp.zeros((0,), A.dtype), lax.linalg.svd(A, compute_uv=False), jnp.zeros((0,), A.dtype)
    return lax.linalg.svd(A, full_matrices=full_matrices)


@lowering(aten._linalg_eigh.default)
def linalg_eigh(A, UPLO="L", compute_v=True):
    """Eigenvalues, ascending, and eigenvectors of hermitian matrices, of which one triangle is read."""
    if A.size == 0:
        return jnp.zeros(A.shape[:-1], _real(A.dtype)), A if compute_v else jnp.zeros((0,), A.dtype)
    vectors, values = lax.linalg.eigh(A, lower=UPLO.upper() == "L", symmetrize_input=False)
    return values, vectors if compute_v else jnp.zeros((0,), A.dtype)


def _complex(dtype):
    return jnp.result_type(dtype, jnp.complex64)


@lowering(aten.linalg_eig.default)
def linalg_eig(self):
    """Eigenvalues and eigenvectors of any square matrices (JAX has them on CPU and GPU)."""
    if self.size == 0:
        return jnp.zeros(self.shape[:-1], _complex(self.dtype)), jnp.zeros(self.shape, _complex(self.dtype))
    values, vectors = lax.linalg.eig(self, compute_left_eigenvectors=False)
    return values, vectors


@lowering(aten._linalg_eigvals.default)
def linalg_eigvals(self):
    """Eigenvalues of any square matrices (JAX has them on CPU and GPU)."""
    if self.size == 0:
        return jnp.zeros(self.shape[:-1], _complex(self.dtype))
    return lax.linalg.eig(self, compute_left_eigenvectors=False, compute_right_eigenvectors=False)[0]


@lowering(aten.linalg_qr.default)
def linalg_qr(A, mode="reduced"):
    """Q and R; Q is empty in mode r."""
    rows, columns = A.shape[-2:]
    size = rows if mode == "complete" else min(rows, columns)
    if A.size == 0:
        q = jnp.broadcast_to(jnp.eye(rows, size, dtype=A.dtype), (*A.shape[:-2], rows, size))
        r = jnp.zeros((*A.shape[:-2], size, columns), A.dtype)
    else:
        q, r = lax.linalg.qr(A, full_matrices=mode == "complete")
    return (jnp.zeros((0,), A.dtype) if mode == "r" else q), r


@lowering(aten.geqrf.default, column_major=(0,))
def geqrf(self):
    """Householder reflectors below R, and their factors, as LAPACK stores them."""
    rows, columns = self.shape[-2:]
    size = min(rows, columns)
    tau = jnp.zeros((*self.shape[:-2], size), self.dtype)
    if self.size == 0:
        return self, tau
    row = lax.broadcasted_iota(jnp.int32, (rows,), 0)

    def step(k, carry):
        a, tau = carry
        column = a[..., :, k]
        alpha = a[..., k, k]
        below = jnp.where(row > k, column, 0)
        rest = jnp.square(jnp.abs(below)).sum(-1)
        norm = jnp.sqrt(jnp.square(jnp.abs(alpha)) + rest)
        beta = jnp.where(alpha.real >= 0, -norm, norm)
        trivial = (rest == 0) & (alpha.imag == 0)
        safe = jnp.where(trivial, 1, beta)
        factor = jnp.where(trivial, 0, (beta - alpha) / safe).astype(a.dtype)
        v = below / jnp.where(trivial, 1, alpha - beta)[..., None] + (row == k)
        # the reflector is applied conjugate transposed
        update = factor.conj()[..., None, None] * v[..., :, None] * (v.conj()[..., None, :] @ a)
        a = a - jnp.where(lax.broadcasted_iota(jnp.int32, (columns,), 0) >= k, update, 0)
        stored = jnp.where(row > k, v, a[..., :, k])
        return a.at[..., :, k].set(jnp.where(trivial[..., None], a[..., :, k], stored)), tau.at[..., k].set(factor)

    return lax.fori_loop(jnp.int32(0), jnp.int32(size), step, (self, tau))


@lowering(aten.linalg_householder_product.default)
def linalg_householder_product(input, tau):
    """Product of Householder reflectors."""
    if input.size == 0:
        return input
    if tau.shape[-1] == 0:
        return jnp.broadcast_to(jnp.eye(*input.shape[-2:], dtype=input.dtype), input.shape)
    return lax.linalg.householder_product(input, tau)


@lowering(aten.ormqr.default)
def ormqr(self, input2, input3, left=True, transpose=False):
    """Multiply `input3` by the product of the reflectors in `self`."""
    rows, columns = self.shape[-2:]
    square = (
        jnp.zeros((*self.shape[:-2], rows, rows), self.dtype).at[..., :, : min(rows, columns)].set(self[..., :, :rows])
    )
    q = linalg_householder_product(square, input2) if square.size else square
    q = mH(q) if transpose else q
    return q @ input3 if left else input3 @ q


def _static_residuals(self, b, rcond=None, *, driver=None):
    return driver in (None, "gelsy", "gels") or len(self.shape) < 2 or self.shape[-2] <= self.shape[-1]


def _least_squares(a, b, rcond, driver):
    """Solution, rank and singular values by the singular value decomposition; rank as the drivers of LAPACK decide it."""
    rows, columns = a.shape[-2:]
    vector = b.ndim == 1 or (a.ndim - 1 == b.ndim and a.shape[:-1] == b.shape)
    right = b[..., None] if vector else b
    batch = jnp.broadcast_shapes(a.shape[:-2], right.shape[:-2])
    cut = jnp.finfo(a.dtype).eps * max(rows, columns) if rcond is None else rcond
    if a.size == 0 or right.size == 0:
        x = jnp.zeros((*batch, columns, right.shape[-1]), a.dtype)
        s = jnp.zeros((*a.shape[:-2], min(rows, columns)), _real(a.dtype))
        rank = jnp.zeros(a.shape[:-2], jnp.int32)
    else:
        u, s, vh = lax.linalg.svd(a, full_matrices=False)
        kept = s > cut * s[..., :1]
        rank = kept.sum(-1, dtype=jnp.int32)
        kept |= driver == "gels"  # which takes the rank to be full
        x = mH(vh) @ (jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)[..., None].astype(a.dtype) * (mH(u) @ right))
    return x, (x[..., 0] if vector else x), right, rank, s


def _lstsq(self, b, rcond, driver, with_residuals):
    x, shown, right, rank, s = _least_squares(self, b, rcond, driver)
    none = jnp.zeros((0,), s.dtype)
    residuals = jnp.square(jnp.abs(right - self @ x)).sum(-2) if with_residuals else none
    rank = jnp.zeros((0,), jnp.int32) if driver == "gels" else rank
    return shown, residuals, rank.astype(jnp.int64), (s if driver in ("gelsd", "gelss") else none)


@lowering(aten.linalg_lstsq.default, when=_static_residuals, priority=1)
def linalg_lstsq(self, b, rcond=None, *, driver=None):
    """Least squares: solution, residuals, rank and singular values."""
    return _lstsq(self, b, rcond, driver or "gelsy", driver == "gels" and self.shape[-2] > self.shape[-1])


@lowering(aten.linalg_lstsq.default, kind="dynamic")
def linalg_lstsq_residuals(self, b, rcond=None, *, driver=None):
    """Least squares where residuals are given only if the rank is full."""
    rank = _least_squares(self, b, rcond, driver)[3]
    return _lstsq(self, b, rcond, driver, bool((rank == self.shape[-1]).all()))


@lowering(aten.linalg_pinv.atol_rtol_tensor)
def linalg_pinv(self, *, atol=None, rtol=None, hermitian=False):
    """Pseudo-inverse; singular values up to ``max(atol, rtol * largest)`` count as zero."""
    rows, columns = self.shape[-2:]
    if self.size == 0:
        return jnp.zeros((*self.shape[:-2], columns, rows), self.dtype)
    real = _real(self.dtype)
    if rtol is None:
        rtol = jnp.asarray(jnp.finfo(real).eps * max(rows, columns), real)
        rtol = rtol if atol is None else jnp.where(atol > 0, jnp.zeros_like(rtol), rtol)
    atol = jnp.zeros((), real) if atol is None else atol
    if hermitian:
        vectors, values = lax.linalg.eigh(self, lower=True, symmetrize_input=False)
        size = jnp.abs(values)
        top = size.max(-1, keepdims=True)
    else:
        u, values, vh = lax.linalg.svd(self, full_matrices=False)
        size, top = values, values[..., :1]
    keep = size > jnp.maximum(jnp.asarray(atol)[..., None], jnp.asarray(rtol)[..., None] * top)
    inverse = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0).astype(self.dtype)[..., None, :]
    return (vectors * inverse) @ mH(vectors) if hermitian else (mH(vh) * inverse) @ mH(u)


@lowering(aten.linalg_matrix_exp.default)
def linalg_matrix_exp(self):
    """Matrix exponential: Taylor's polynomial of degree 19 of the matrix scaled to a small norm, squared back."""
    if self.size == 0:
        return self
    n, x = self.shape[-1], wide(self)
    most = 3 if _real(x.dtype) == jnp.float32 else 1  # norm at which the polynomial is exact to the last digit
    norm = jnp.abs(x).sum(-2).max(-1) / most
    squarings = jnp.where(norm > 1, jnp.ceil(jnp.log2(jnp.where(norm > 1, norm, 1))), 0)
    squarings = jnp.where(jnp.isfinite(squarings), squarings, 0).astype(jnp.int32)
    x = x / jnp.exp2(squarings.astype(norm.dtype))[..., None, None].astype(x.dtype)
    powers = [jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), x.shape), x]
    while len(powers) < 6:
        powers.append(powers[-1] @ x)
    coefficients = [1.0]
    for k in range(1, 20):
        coefficients.append(coefficients[-1] / k)
    # Paterson and Stockmeyer: a polynomial in x**5 whose coefficients are polynomials in x
    total = jnp.zeros_like(x)
    for start in (15, 10, 5, 0):
        block = sum((jnp.asarray(coefficients[start + i], x.dtype) * powers[i] for i in range(5)), jnp.zeros_like(x))
        total = block if start == 15 else total @ powers[5] + block

    def square(carry):
        k, y = carry
        return k + 1, jnp.where((k < squarings)[..., None, None], y @ y, y)

    return lax.while_loop(lambda c: c[0] < squarings.max(), square, (jnp.int32(0), total))[1]


@lowering(aten.linalg_cross.default)
def linalg_cross(self, other, *, dim=-1):
    """Cross product along `dim`."""
    a, b = jnp.broadcast_arrays(self, other)
    (a0, a1, a2), (b0, b1, b2) = (jnp.unstack(t, axis=dim) for t in (a, b))
    return jnp.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0], axis=dim)
