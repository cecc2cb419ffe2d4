"""Reductions: sums, means, variances, norms, extrema and their indices, any and all."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.dtypes import to_jax
from torchax.ops import aten, lowering

from ._common import axes, cast, is_complex, is_float, is_inexact, wide


def _summand(x, dtype):
    """x in the dtype in which it is summed: of `dtype`, else int64 for integers; 16-bit floats widened."""
    if dtype is not None:
        return wide(cast(x, to_jax(dtype)))
    return wide(x) if is_inexact(x) else x.astype(np.int64)


@lowering(aten.sum.default, aten.sum.dim_IntList)
def sum_(x, dim=None, keepdim=False, *, dtype=None):
    """The sum over dim, all of them by default."""
    return jnp.sum(_summand(x, dtype), axis=axes(dim, x.ndim), keepdims=keepdim)


@lowering(aten.nansum.default)
def nansum(x, dim=None, keepdim=False, *, dtype=None):
    """The sum, where NaN counts as zero."""
    if is_inexact(x):
        x = jnp.where(jnp.isnan(x), 0, x)
    return sum_(x, dim, keepdim, dtype=dtype)


@lowering(aten.mean.default)
def mean_all(x, *, dtype=None):
    """The mean of all elements."""
    return mean(x, dtype=dtype)


@lowering(aten.mean.dim)
def mean(x, dim=None, keepdim=False, *, dtype=None):
    """The mean over dim."""
    return jnp.mean(_summand(x, dtype), axis=axes(dim, x.ndim), keepdims=keepdim)


@lowering(aten.prod.default)
def prod_all(x, *, dtype=None):
    """The product of all elements."""
    return jnp.prod(_summand(x, dtype))


@lowering(aten.prod.dim_int)
def prod(x, dim, keepdim=False, *, dtype=None):
    """The product over dim."""
    return jnp.prod(_summand(x, dtype), axis=axes(dim, x.ndim), keepdims=keepdim)


def _count(x, dims) -> int:
    return int(np.prod([x.shape[d] for d in dims], dtype=np.int64))


def _var_mean(x, dim, correction, keepdim):
    dims = axes(dim, x.ndim)
    y = wide(x)
    mean = jnp.mean(y, axis=dims, keepdims=True)
    centered = y - mean
    dof = np.asarray(max(_count(x, dims) - (1 if correction is None else correction), 0), centered.real.dtype)
    parts = (centered.real, centered.imag) if is_complex(x) else (centered,)
    variance = sum(jnp.sum(part * part, axis=dims, keepdims=keepdim) / dof for part in parts)
    return variance, mean if keepdim else jnp.squeeze(mean, dims)


@lowering(aten.var.correction, static=("correction",))
def var(x, dim=None, *, correction=None, keepdim=False):
    """The variance with n - correction degrees of freedom."""
    return _var_mean(x, dim, correction, keepdim)[0]


@lowering(aten.std.correction, static=("correction",))
def std(x, dim=None, *, correction=None, keepdim=False):
    """The standard deviation."""
    return jnp.sqrt(_var_mean(x, dim, correction, keepdim)[0])


@lowering(aten.var_mean.correction, static=("correction",))
def var_mean(x, dim=None, *, correction=None, keepdim=False):
    """The variance and the mean."""
    return _var_mean(x, dim, correction, keepdim)


@lowering(aten.std_mean.correction, static=("correction",))
def std_mean(x, dim=None, *, correction=None, keepdim=False):
    """The standard deviation and the mean."""
    variance, mean = _var_mean(x, dim, correction, keepdim)
    return jnp.sqrt(variance), mean


@lowering(aten.amax.default)
def amax(x, dim=(), keepdim=False):
    """The maximum over dim; NaN wins."""
    return jnp.max(x, axis=axes(dim, x.ndim), keepdims=keepdim)


@lowering(aten.amin.default)
def amin(x, dim=(), keepdim=False):
    """The minimum over dim; NaN wins."""
    return jnp.min(x, axis=axes(dim, x.ndim), keepdims=keepdim)


@lowering(aten.aminmax.default)
def aminmax(x, *, dim=None, keepdim=False):
    """The minimum and the maximum over dim."""
    return amin(x, dim, keepdim), amax(x, dim, keepdim)


@lowering(aten.max.default)
def max_all(x):
    """The maximum of all elements."""
    return jnp.max(x)


@lowering(aten.min.default)
def min_all(x):
    """The minimum of all elements."""
    return jnp.min(x)


def _index(find, x, dim, keepdim=False):
    """The first index of the extremum along dim; of the flattened array where dim is None."""
    y = x.reshape(-1) if dim is None or x.ndim == 0 else x
    axis = 0 if dim is None or x.ndim == 0 else dim % x.ndim
    if y.dtype == np.bool_:
        y = y.astype(np.uint8)
    index = find(y, axis, np.int64 if y.shape[axis] > np.iinfo(np.int32).max else np.int32)
    if keepdim:
        return index.reshape((1,) * x.ndim) if dim is None or x.ndim == 0 else jnp.expand_dims(index, axis)
    return index


@lowering(aten.argmax.default)
def argmax(x, dim=None, keepdim=False):
    """The index of the first maximum; NaN counts as the largest."""
    return _index(lax.argmax, x, dim, keepdim)


@lowering(aten.argmin.default)
def argmin(x, dim=None, keepdim=False):
    """The index of the first minimum; NaN counts as the smallest."""
    return _index(lax.argmin, x, dim, keepdim)


@lowering(aten.max.dim)
def max_dim(x, dim, keepdim=False):
    """The maximum along dim and the index of the first one."""
    return amax(x, dim, keepdim), _index(lax.argmax, x, dim, keepdim)


@lowering(aten.min.dim)
def min_dim(x, dim, keepdim=False):
    """The minimum along dim and the index of the first one."""
    return amin(x, dim, keepdim), _index(lax.argmin, x, dim, keepdim)


@lowering(aten.any.default, aten.any.dim, aten.any.dims)
def any_(x, dim=None, keepdim=False):
    """Whether an element is nonzero."""
    return jnp.any(x != 0, axis=_some(dim, x.ndim), keepdims=keepdim)


@lowering(aten.all.default, aten.all.dim, aten.all.dims)
def all_(x, dim=None, keepdim=False):
    """Whether all elements are nonzero."""
    return jnp.all(x != 0, axis=_some(dim, x.ndim), keepdims=keepdim)


def _some(dim, ndim):
    """any.dims and all.dims reduce nothing where dim is the empty list."""
    return () if isinstance(dim, (tuple, list)) and not dim else axes(dim, ndim)


@lowering(aten.logsumexp.default)
def logsumexp(x, dim, keepdim=False):
    """log(sum(exp(x))), infinite maxima left out of the shift."""
    dims = axes(dim, x.ndim)
    y = wide(x) if is_inexact(x) else x.astype(np.float32)
    if y.size == 0:
        return jnp.log(jnp.sum(jnp.exp(y), axis=dims, keepdims=keepdim))
    top = jnp.max(y.real, axis=dims, keepdims=True)
    top = jnp.where(jnp.abs(top) == jnp.inf, 0, top)
    total = jnp.log(jnp.sum(jnp.exp(y - top), axis=dims, keepdims=keepdim))
    return total + (top if keepdim else jnp.squeeze(top, dims))


@lowering(aten.linalg_vector_norm.default, static=("ord",))
def vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    """sum(|x|**ord) ** (1 / ord), and its limits for ord 0, inf and -inf."""
    dims = axes(dim, x.ndim)
    x = wide(x if dtype is None else cast(x, to_jax(dtype)))
    if ord == 2:
        squares = x.real**2 + x.imag**2 if is_complex(x) else x * x
        return jnp.sqrt(jnp.sum(squares, axis=dims, keepdims=keepdim))
    size = jnp.abs(x)
    if ord == float("inf"):
        return jnp.max(size, axis=dims, keepdims=keepdim, initial=0 if size.size == 0 else None)
    if ord == -float("inf"):
        return jnp.min(size, axis=dims, keepdims=keepdim)
    if ord == 0:
        return jnp.sum((size != 0).astype(size.dtype), axis=dims, keepdims=keepdim)
    if ord == 1:
        return jnp.sum(size, axis=dims, keepdims=keepdim)
    total = jnp.sum(size ** jnp.asarray(ord, size.dtype), axis=dims, keepdims=keepdim)
    return total ** jnp.asarray(1 / ord, size.dtype)


@lowering(aten.norm.Scalar, static=("p",))
def norm(x, p=2):
    """The p-norm of all elements."""
    return vector_norm(x, p)


@lowering(aten.norm.ScalarOpt_dim, static=("p",))
def norm_dim(x, p, dim, keepdim=False):
    """The p-norm over dim."""
    return vector_norm(x, 2 if p is None else p, dim, keepdim)


@lowering(aten.norm.ScalarOpt_dim_dtype, static=("p",))
def norm_dim_dtype(x, p, dim, keepdim, *, dtype):
    """The p-norm over dim, computed in dtype."""
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)


@lowering(aten.norm.ScalarOpt_dtype, static=("p",))
def norm_dtype(x, p, *, dtype):
    """The p-norm of all elements, computed in dtype."""
    return vector_norm(x, 2 if p is None else p, dtype=dtype)


@lowering(aten.dist.default, static=("p",))
def dist(x, other, p=2):
    """The p-norm of x - other."""
    return vector_norm(x - other, p)


@lowering(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def count_nonzero(x, dim=None):
    """How many elements are nonzero."""
    return jnp.sum((x != 0).astype(np.int64), axis=axes(dim, x.ndim))


@lowering(aten.trace.default)
def trace(x):
    """The sum of the diagonal."""
    return sum_(jnp.diagonal(x))


@lowering(aten.equal.default, kind="dynamic")
def equal(x, other):
    """Whether both have the same shape and elements, as a bool of the host."""
    return x.shape == other.shape and bool(jnp.all(x == other))


@lowering(aten._is_all_true.default)
def is_all_true(x):
    """Whether all elements are true."""
    return jnp.all(x)


@lowering(aten._is_any_true.default)
def is_any_true(x):
    """Whether an element is true."""
    return jnp.any(x)


@lowering(aten.hash_tensor.default)
def hash_tensor(x, dim=(), *, keepdim=False, mode=0):
    """The exclusive or of the elements: of the bits of floats (as float64), of integers as uint64."""
    bits = lax.bitcast_convert_type(x.astype(np.float64), np.uint64) if is_float(x) else x.astype(np.uint64)
    dims = axes(dim, x.ndim)
    result = lax.reduce(bits, np.uint64(0), lax.bitwise_xor, dims)
    return jnp.expand_dims(result, dims) if keepdim else result
