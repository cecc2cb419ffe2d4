"""``_foreach_*`` ops that do not follow from an element op of the same name, over lists of tensors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from torchax.dtypes import to_jax
from torchax.ops import Lowering, aten, lowering

from ._common import interpolate
from ._index import opmath, scalar

_traced_once = functools.partial(jax.jit, inline=True)  # lists of hundreds of tensors have few different shapes


def _category(dtype):
    """Rank of a kind of number in torch's promotion: bool, integer, float, complex."""
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    return max((i for i, kind in enumerate(kinds, 1) if jnp.issubdtype(dtype, kind)), default=0)


def _with(x, number):
    """A tensor and a number in the dtype in which torch computes with both."""
    dtype = opmath(x.dtype)
    kind = jnp.result_type(number)
    if _category(kind) > _category(dtype):
        dtype = {1: np.dtype(np.int64), 2: np.dtype(np.float32)}.get(
            _category(kind), np.dtype(np.complex128 if dtype == np.float64 else np.complex64)
        )
    return x.astype(dtype), scalar(number, dtype)


def _over(*tensors):
    """Tensors in the dtype in which torch computes with all of them."""
    dtype = jnp.result_type(*(opmath(t.dtype) for t in tensors))
    return tuple(t.astype(dtype) for t in tensors)


def _pairs(fn):
    """``fn`` over two lists."""
    return lambda xs, others: [fn(*_over(x, o)) for x, o in zip(xs, others, strict=True)]


def _one_number(fn):
    """``fn`` of every tensor and one number."""
    return lambda xs, number: [fn(*_with(x, number)) for x in xs]


def _numbers(fn):
    """``fn`` of every tensor and its number."""
    return lambda xs, numbers: [fn(*_with(x, n)) for x, n in zip(xs, numbers, strict=True)]


EXTREMA = [
    Lowering(op=f"aten::_foreach_{name}.{overload}", fn=over(fn), table=True)
    for name, fn in {
        "maximum": jnp.maximum, "minimum": jnp.minimum, "clamp_max": jnp.minimum, "clamp_min": jnp.maximum
    }.items()
    for overload, over in {"List": _pairs, "Scalar": _one_number, "ScalarList": _numbers}.items()
]  # fmt: skip


def _addcmul(x, a, b, value):
    return x + value * (a * b)


def _addcdiv(x, a, b, value):
    return x + value * (a / b)


def _fused(fn):
    """Overloads of ``x + value * op(a, b)``: one number, a list of numbers, a tensor of numbers."""

    @_traced_once
    def one(x, a, b, value):
        x, a, b = _over(x, a, b)
        return fn(x, a, b, scalar(value, x.dtype))

    def scalar_form(xs, tensor1, tensor2, value=1):
        return [one(x, a, b, value) for x, a, b in zip(xs, tensor1, tensor2, strict=True)]

    def list_form(xs, tensor1, tensor2, scalars):
        return [one(*row) for row in zip(xs, tensor1, tensor2, scalars, strict=True)]

    return {"Scalar": scalar_form, "ScalarList": list_form, "Tensor": list_form}


ADDC = [
    Lowering(op=f"aten::_foreach_{name}.{overload}", fn=fn, table=True)
    for name, formula in {"addcmul": _addcmul, "addcdiv": _addcdiv}.items()
    for overload, fn in _fused(formula).items()
]


@_traced_once
def _lerp(x, end, weight):
    x, end = _over(x, end)
    return interpolate(x, end, scalar(weight, x.dtype))


@lowering(aten._foreach_lerp.Scalar)
def foreach_lerp_scalar(xs, tensors1, weight):
    """From each tensor towards another by `weight`; from the nearer end, as torch's formula does."""
    return [_lerp(x, end, weight) for x, end in zip(xs, tensors1, strict=True)]


@lowering(aten._foreach_lerp.List, aten._foreach_lerp.ScalarList)
def foreach_lerp_list(xs, tensors1, weights):
    """From each tensor towards another by its own weight."""
    return [_lerp(*row) for row in zip(xs, tensors1, weights, strict=True)]


@_traced_once
def _power(base, exponent):
    e, b = _with(exponent, base)
    return jnp.power(b, e)


@lowering(aten._foreach_pow.ScalarAndTensor)
def foreach_pow_base(base, exponent):
    """A number to the power of each tensor."""
    return [_power(base, e) for e in exponent]


@lowering(aten._foreach_copy.default)
def foreach_copy(xs, src, non_blocking=False):
    """Each source in its target's shape."""
    return [jnp.broadcast_to(s.astype(x.dtype), x.shape) for x, s in zip(xs, src, strict=True)]


@lowering(aten._foreach_zero.default)
def foreach_zero(xs):
    """Zeros."""
    return [jnp.zeros_like(x) for x in xs]


@lowering(aten._foreach_clone.default)
def foreach_clone(xs):
    """Copies."""
    return list(xs)


@lowering(aten._foreach_max.default)
def foreach_max(xs):
    """Every tensor's largest element."""
    return [jnp.max(x) for x in xs]


@lowering(aten._foreach_mm.default)
def foreach_mm(xs, mat2):
    """Matrix products, pair by pair."""
    return [jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) for a, b in zip(xs, mat2, strict=True)]


def _norm(x, order):
    if order == 0:
        return jnp.sum(x != 0)
    x = jnp.abs(x)
    if order in (float("inf"), float("-inf")):
        return jnp.max(x) if order > 0 else jnp.min(x)
    if order == 1:
        return jnp.sum(x)
    return jnp.sqrt(jnp.sum(x * x)) if order == 2 else jnp.sum(x**order) ** (1 / order)


def _accumulated(x, dtype):
    return x.astype(opmath(x.dtype) if dtype is None else to_jax(dtype))


@lowering(aten._foreach_norm.Scalar, static=("ord",))
def foreach_norm(xs, ord=2, dtype=None):
    """Every tensor's vector norm."""
    return [_norm(_accumulated(x, dtype), ord) for x in xs]


@lowering(aten._foreach_powsum.Scalar, static=("ord",))
def foreach_powsum(xs, ord=2, dtype=None):
    """Every tensor's sum of powers of absolute values."""
    return [jnp.sum(jnp.abs(_accumulated(x, dtype)) ** ord) for x in xs]
