"""Matrix products. 16-bit floats are accumulated in float32 and rounded once."""

import numbers

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.dtypes import to_jax, to_torch
from torchax.errors import InvalidOperands
from torchax.ops import aten, lowering

from ._common import accumulator, is_complex


def _check_same(a, b):
    if a.dtype != b.dtype:
        raise InvalidOperands(
            f"expected m1 and m2 to have the same dtype, but got: {to_torch(a.dtype)} != {to_torch(b.dtype)}; "
            "convert one of them with .to(...)"
        )


def _dot(a, b, contract, batch=((), ())):
    """dot_general whose result has the dtype of the accumulator."""
    _check_same(a, b)
    dtype = accumulator(a.dtype)
    return lax.dot_general(a, b, (contract, batch), preferred_element_type=dtype if dtype != a.dtype else None)


def _mm(a, b):
    return _dot(a, b, ((1,), (0,)))


def _bmm(a, b):
    return _dot(a, b, ((2,), (1,)), ((0,), (0,)))


def _scaled(x, factor):
    """x factor in the accumulator's dtype; the factor 1 costs nothing."""
    dtype = accumulator(x.dtype)
    if isinstance(factor, numbers.Number) and factor == 1:
        return x.astype(dtype)
    return x.astype(dtype) * jnp.asarray(factor).astype(dtype)


def _add(x, product, beta, alpha):
    """beta x + alpha product; beta == 0 ignores x, whatever it holds."""
    result = _scaled(product, alpha)
    if isinstance(beta, numbers.Number) and beta == 0:
        return result
    return (_scaled(x, beta) + result).astype(x.dtype)


FACTORS = {"beta": (0, 1), "alpha": (1,)}


@lowering(aten.mm.default)
def mm(a, b):
    """a b for [n, k], [k, m]."""
    return _mm(a, b).astype(a.dtype)


@lowering(aten.bmm.default)
def bmm(a, b):
    """a b for [i, n, k], [i, k, m]."""
    return _bmm(a, b).astype(a.dtype)


@lowering(aten.mm.dtype, aten.bmm.dtype)
def mm_dtype(a, b, out_dtype):
    """a b, not rounded to the dtype of a."""
    dtype = to_jax(out_dtype)
    return (_mm(a, b) if a.ndim == 2 else _bmm(a, b)).astype(dtype)


@lowering(aten.mv.default)
def mv(a, x):
    """a x for [n, k], [k]."""
    return _dot(a, x, ((1,), (0,))).astype(a.dtype)


@lowering(aten.dot.default)
def dot(x, other):
    """The sum of x other."""
    return _dot(x, other, ((0,), (0,))).astype(x.dtype)


@lowering(aten.vdot.default)
def vdot(x, other):
    """The sum of conj(x) other."""
    return dot(jnp.conj(x) if is_complex(x) else x, other)


@lowering(aten.addmm.default, specialize=FACTORS)
def addmm(x, mat1, mat2, *, beta=1, alpha=1):
    """beta x + alpha mat1 mat2."""
    return _add(x, _mm(mat1, mat2), beta, alpha)


@lowering(aten.addmm.dtype, aten.baddbmm.dtype, specialize=FACTORS)
def addmm_dtype(x, mat1, mat2, out_dtype, *, beta=1, alpha=1):
    """beta x + alpha mat1 mat2, not rounded to the dtype of mat1."""
    product = _mm(mat1, mat2) if mat1.ndim == 2 else _bmm(mat1, mat2)
    return _add(x.astype(to_jax(out_dtype)), product, beta, alpha)


@lowering(aten._addmm_activation.default, specialize=FACTORS)
def addmm_activation(x, mat1, mat2, *, beta=1, alpha=1, use_gelu=False):
    """relu (or gelu) of beta x + alpha mat1 mat2."""
    result = _add(x, _mm(mat1, mat2), beta, alpha)
    if not use_gelu:
        return jnp.maximum(result, 0)
    wide = result.astype(accumulator(result.dtype))
    return 0.5 * wide * (1 + lax.erf(wide * np.sqrt(0.5).astype(wide.dtype)))


@lowering(aten.addmv.default, specialize=FACTORS)
def addmv(x, mat, vec, *, beta=1, alpha=1):
    """beta x + alpha mat vec."""
    return _add(x, _dot(mat, vec, ((1,), (0,))), beta, alpha)


@lowering(aten.baddbmm.default, specialize=FACTORS)
def baddbmm(x, batch1, batch2, *, beta=1, alpha=1):
    """beta x + alpha batch1 batch2."""
    return _add(x, _bmm(batch1, batch2), beta, alpha)


@lowering(aten.addbmm.default, specialize=FACTORS)
def addbmm(x, batch1, batch2, *, beta=1, alpha=1):
    """beta x + alpha times the sum of the products batch1[i] batch2[i]."""
    return _add(x, _dot(batch1, batch2, ((0, 2), (0, 1))), beta, alpha)


@lowering(aten.addr.default, specialize=FACTORS, promote="default", promote_only=("self", "vec1", "vec2"))
def addr(x, vec1, vec2, *, beta=1, alpha=1):
    """beta x + alpha vec1 outer vec2."""
    outer = vec1[:, None] * vec2[None, :]
    if x.dtype == np.bool_:
        return _add_bool(x, outer, beta, alpha)
    return _add(x, outer, beta, alpha)


def _add_bool(x, product, beta, alpha):
    return (jnp.asarray(beta) != 0) & x | (jnp.asarray(alpha) != 0) & product


def _linear_backward(grads, args, result, needs):
    grad = grads[0] if isinstance(grads, (tuple, list)) else grads
    x, weight = args[:2]
    batch = tuple(range(x.ndim - 1))
    out = []
    if needs[0]:
        other = _conj(weight)
        gx = _dot(grad, other, ((grad.ndim - 1,), (0,))) if weight.ndim == 2 else grad[..., None] * other
        out.append(gx.astype(x.dtype))
    else:
        out.append(None)
    out.append(_dot(grad, _conj(x), (batch, batch)).astype(weight.dtype) if needs[1] else None)
    if len(needs) > 2:
        out.append(jnp.sum(grad, axis=batch, dtype=accumulator(grad.dtype)).astype(grad.dtype) if needs[2] else None)
    return tuple(out)


def _conj(x):
    return jnp.conj(x) if is_complex(x) else x


@lowering(aten.linear.default, whole=True, backward=_linear_backward)
def linear(x, weight, bias=None):
    """x weight^T + bias: x [..., in], weight [out, in] (or [in]), bias [out], result [..., out]."""
    product = _dot(x, weight, ((x.ndim - 1,), (weight.ndim - 1,)))
    if bias is not None:
        product = product + bias.astype(product.dtype)
    return product.astype(x.dtype)


def _batched(grad, x, other):
    """The operands of a product as stacks of matrices: what is 1-d gets the axis that matmul gives it."""
    if x.ndim == 1:
        x, grad = x[None, :], jnp.expand_dims(grad, -1 if other.ndim == 1 else -2)
    if other.ndim == 1:
        other, grad = other[:, None], grad[..., None]
    return grad, x, other


def _summed_to(grad, shape):
    """grad summed over the axes that broadcasting added or stretched."""
    extra = grad.ndim - len(shape)
    stretched = tuple(i for i in range(extra, grad.ndim) if shape[i - extra] == 1 and grad.shape[i] != 1)
    grad = jnp.sum(grad, axis=(*range(extra), *stretched), keepdims=True) if extra or stretched else grad
    return grad.reshape(shape)


def _product(a, b):
    _check_same(a, b)
    return jnp.matmul(a, b, preferred_element_type=accumulator(a.dtype))


def _matmul_backward(grads, args, result, needs):
    grad = grads[0] if isinstance(grads, (tuple, list)) else grads
    x, other = args[:2]
    grad, a, b = _batched(grad, x, other)
    gx = gother = None
    if needs[0]:
        gx = _summed_to(_product(grad, _conj(jnp.swapaxes(b, -1, -2))), a.shape).reshape(x.shape).astype(x.dtype)
    if needs[1]:
        if b.ndim == 2:  # one product over all batches
            batch = tuple(range(a.ndim - 1))
            gother = _dot(_conj(a), grad, (batch, batch))
        else:
            gother = _summed_to(_product(_conj(jnp.swapaxes(a, -1, -2)), grad), b.shape)
        gother = gother.reshape(other.shape).astype(other.dtype)
    return gx, gother


@lowering(aten.matmul.default, whole=True, backward=_matmul_backward)
def matmul(x, other):
    """The product of (stacks of) matrices and vectors, batch axes broadcast."""
    return _product(x, other).astype(x.dtype)
