"""Linear systems: triangular, Cholesky and LU factorizations, determinants and inverses.

`info` is LAPACK's: 0, or the order of the first leading minor (Cholesky) or pivot (LU) that fails.
"""

import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering


def mT(x):
    """The transposed matrices."""
    return jnp.swapaxes(x, -1, -2)


def mH(x):
    """The conjugate transposed matrices."""
    return mT(x).conj() if jnp.iscomplexobj(x) else mT(x)


def _together(a, b):
    """Both with the same batch dimensions."""
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return jnp.broadcast_to(a, (*batch, *a.shape[-2:])), jnp.broadcast_to(b, (*batch, *b.shape[-2:]))


def solve_triangular(a, b, *, upper, left=True, unit=False, adjoint=False):
    """``a @ x = b``, or ``x @ a = b``, batches broadcast; `adjoint` takes the conjugate transpose of `a`."""
    a, b = _together(a, b)
    if a.size == 0 or b.size == 0:
        return jnp.zeros_like(b)
    return lax.linalg.triangular_solve(
        a, b, left_side=left, lower=not upper, transpose_a=adjoint, conjugate_a=adjoint, unit_diagonal=unit
    )


def _failing_minor(a):
    """Order of the first leading minor of ``[..., n, n]`` that is not positive, by elimination; 0 if there is none."""
    n = a.shape[-1]

    def step(k, carry):
        a, info = carry
        pivot = a[..., k, k].real
        info = jnp.where((info == 0) & ~(pivot > 0), (k + 1).astype(jnp.int32), info)
        column = a[..., :, k]
        return a - column[..., :, None] * column[..., None, :].conj() / jnp.where(pivot > 0, pivot, 1)[
            ..., None, None
        ], info

    return lax.fori_loop(jnp.int32(0), jnp.int32(n), step, (a, jnp.zeros(a.shape[:-2], jnp.int32)))[1]


def _cholesky(a, upper):
    if a.size == 0:
        return jnp.zeros_like(a), jnp.zeros(a.shape[:-2], jnp.int32)
    lower = jnp.tril(mH(a) if upper else a)
    factor = lax.linalg.cholesky(lower, symmetrize_input=False)
    failed = ~jnp.isfinite(factor).all((-2, -1))

    def look():
        full = lower + mH(jnp.tril(lower, -1))
        return jnp.where(failed, _failing_minor(full), 0)

    info = lax.cond(failed.any(), look, lambda: jnp.zeros(failed.shape, jnp.int32))
    return mH(factor) if upper else factor, info


@lowering(aten.linalg_cholesky_ex.default)
def linalg_cholesky_ex(self, *, upper=False, check_errors=False):
    """Cholesky factor and info."""
    return _cholesky(self, upper)


@lowering(aten.cholesky.default)
def cholesky(self, upper=False):
    """Cholesky factor."""
    return _cholesky(self, upper)[0]


def _cholesky_solve(b, factor, upper):
    if upper:
        return solve_triangular(factor, solve_triangular(factor, b, upper=True, adjoint=True), upper=True)
    return solve_triangular(factor, solve_triangular(factor, b, upper=False), upper=False, adjoint=True)


@lowering(aten._cholesky_solve_helper.default)
def cholesky_solve(self, A, upper):
    """Solve with the Cholesky factor `A`."""
    return _cholesky_solve(self, A, upper)


@lowering(aten.cholesky_inverse.default)
def cholesky_inverse(self, upper=False):
    """Inverse from the Cholesky factor."""
    return _cholesky_solve(jnp.broadcast_to(jnp.eye(self.shape[-1], dtype=self.dtype), self.shape), self, upper)


@lowering(aten.linalg_solve_triangular.default)
def linalg_solve_triangular(self, B, *, upper, left=True, unitriangular=False):
    """Solve with a triangular matrix."""
    return solve_triangular(self, B, upper=upper, left=left, unit=unitriangular)


@lowering(aten.triangular_solve.default)
def triangular_solve(self, A, upper=True, transpose=False, unitriangular=False):
    """Solve with a triangular matrix, transposed or not; the solution and the matrix."""
    a, b = _together(A, self)
    if transpose:
        return solve_triangular(mT(a), b, upper=not upper, unit=unitriangular), a
    return solve_triangular(a, b, upper=upper, unit=unitriangular), a


def _lu(a):
    """LU in one matrix, pivots counted from one, and info."""
    size = min(a.shape[-2:])
    if a.size == 0:
        pivots = jnp.broadcast_to(jnp.arange(1, size + 1, dtype=jnp.int32), (*a.shape[:-2], size))
        return a, pivots, jnp.zeros(a.shape[:-2], jnp.int32)
    lu, pivots, _ = lax.linalg.lu(a)
    zero = jnp.diagonal(lu, axis1=-2, axis2=-1) == 0
    info = jnp.where(zero.any(-1), jnp.argmax(zero, -1).astype(jnp.int32) + 1, 0)
    return lu, pivots + 1, info


def _needs_pivots(pivot):
    if not pivot:
        raise RuntimeError("linalg.lu: LU without pivoting is not implemented on device jax")


def _permutation(pivots, rows: int):
    if pivots.size == 0:
        return jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (*pivots.shape[:-1], rows))
    return lax.linalg.lu_pivots_to_permutation(pivots.astype(jnp.int32) - 1, rows)


def _unpack(lu, pivots, unpack_data=True, unpack_pivots=True):
    rows, columns = lu.shape[-2:]
    size = min(rows, columns)
    p = lower = upper = jnp.zeros((0,), lu.dtype)
    if unpack_data:
        lower = jnp.tril(lu[..., :, :size], -1) + jnp.eye(rows, size, dtype=lu.dtype)
        upper = jnp.triu(lu[..., :size, :])
    if unpack_pivots:
        permutation = _permutation(pivots, rows)
        p = (permutation[..., None, :] == lax.broadcasted_iota(permutation.dtype, (rows, 1), 0)).astype(lu.dtype)
    return p, lower, upper


@lowering(aten.linalg_lu_factor_ex.default)
def linalg_lu_factor_ex(A, *, pivot=True, check_errors=False):
    """LU in one matrix, pivots and info."""
    _needs_pivots(pivot)
    return _lu(A)


@lowering(aten.linalg_lu.default)
def linalg_lu(A, *, pivot=True):
    """P, L and U."""
    _needs_pivots(pivot)
    return _unpack(*_lu(A)[:2])


@lowering(aten.lu_unpack.default)
def lu_unpack(LU_data, LU_pivots, unpack_data=True, unpack_pivots=True):
    """P, L and U from LU in one matrix."""
    return _unpack(LU_data, LU_pivots, unpack_data, unpack_pivots)


def _lu_solve(lu, pivots, b, left=True, adjoint=False):
    if not left:
        return mH(_lu_solve(lu, pivots, mH(b), True, not adjoint))
    lu, b = _together(lu, b)
    if lu.size == 0 or b.size == 0:
        return jnp.zeros_like(b)
    n = lu.shape[-1]
    permutation = jnp.broadcast_to(_permutation(pivots, n), (*lu.shape[:-2], n))
    if adjoint:
        x = solve_triangular(
            lu, solve_triangular(lu, b, upper=True, adjoint=True), upper=False, unit=True, adjoint=True
        )
        return jnp.take_along_axis(x, jnp.argsort(permutation, axis=-1)[..., None], -2)
    b = jnp.take_along_axis(b, permutation[..., None], -2)
    return solve_triangular(lu, solve_triangular(lu, b, upper=False, unit=True), upper=True)


@lowering(aten.linalg_lu_solve.default)
def linalg_lu_solve(LU, pivots, B, *, left=True, adjoint=False):
    """Solve with LU in one matrix."""
    return _lu_solve(LU, pivots, B, left, adjoint)


@lowering(aten._linalg_solve_ex.default)
def linalg_solve_ex(A, B, *, left=True, check_errors=False):
    """Solution, LU, pivots and info; `B` may be a batch of vectors."""
    vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    lu, pivots, info = _lu(A)
    x = _lu_solve(lu, pivots, B[..., None] if vector else B, left or vector)
    return (x[..., 0] if vector else x), lu, pivots, info


@lowering(aten.linalg_inv_ex.default)
def linalg_inv_ex(A, *, check_errors=False):
    """Inverse and info."""
    lu, pivots, info = _lu(A)
    eye = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)
    return _lu_solve(lu, pivots, eye), info


def _swaps(pivots):
    """1 or -1: the sign of the permutation."""
    moved = pivots != jnp.arange(1, pivots.shape[-1] + 1, dtype=pivots.dtype)
    return 1 - 2 * (moved.sum(-1, dtype=jnp.int32) % 2)


def _factor_as_torch(a, row_major):
    # for determinants torch factors the transpose of a real matrix that is row-major, and its gradients rely on it
    return _lu(mT(a) if "A" in row_major and not jnp.iscomplexobj(a) else a)


@lowering(aten._linalg_det.default, layouts=True)
def linalg_det(A, row_major=()):
    """Determinant, LU and pivots."""
    lu, pivots, _ = _factor_as_torch(A, row_major)
    return jnp.diagonal(lu, axis1=-2, axis2=-1).prod(-1) * _swaps(pivots).astype(A.dtype), lu, pivots


@lowering(aten._linalg_slogdet.default, layouts=True)
def linalg_slogdet(A, row_major=()):
    """Sign and logarithm of the determinant, LU and pivots."""
    lu, pivots, _ = _factor_as_torch(A, row_major)
    diagonal = jnp.diagonal(lu, axis1=-2, axis2=-1)
    sign = jnp.sign(diagonal).prod(-1) * _swaps(pivots).astype(A.dtype)
    return sign, jnp.log(jnp.abs(diagonal)).sum(-1), lu, pivots
