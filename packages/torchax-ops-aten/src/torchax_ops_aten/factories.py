"""Ops that make tensors of given values; one program each, their numbers are run-time operands."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torchax.dtypes import to_jax
from torchax.ops import aten, lowering

from ._common import cast
from ._index import scalar

_KINDS = {bool: "b", int: "i", float: "f", complex: "c"}  # as in numpy, which takes 10 us to say so


def _dtype(dtype, *numbers):
    """`dtype`, else the default one: integers give int64, floats torch's default dtype."""
    if dtype is not None:
        return to_jax(dtype)
    kinds = {_KINDS.get(type(n)) or jnp.result_type(n).kind for n in numbers}
    if "c" in kinds:
        return to_jax(torch.complex128 if torch.get_default_dtype() == torch.float64 else torch.complex64)
    if kinds == {"b"}:
        return np.dtype(np.bool_)
    if kinds and kinds <= {"i", "u"}:
        return np.dtype(np.int64)
    return to_jax(torch.get_default_dtype())


@lowering(aten.zeros.default, aten.empty.memory_format)
def zeros(size, *, dtype=None):
    """Zeros."""
    return jnp.zeros(tuple(size), _dtype(dtype))


@lowering(aten.ones.default)
def ones(size, *, dtype=None):
    """Ones."""
    return jnp.ones(tuple(size), _dtype(dtype))


@lowering(aten.empty_strided.default, aten.empty_permuted.default)
def empty_strided(size, stride, *, dtype=None):
    """Zeros; the memory layout is not ours to choose."""
    return jnp.zeros(tuple(size), _dtype(dtype))


@lowering(aten.new_empty.default, aten.new_zeros.default)
def new_zeros(x, size, *, dtype=None):
    """Zeros of the dtype of `x`."""
    return jnp.zeros(tuple(size), x.dtype if dtype is None else to_jax(dtype))


@lowering(aten.new_empty_strided.default)
def new_empty_strided(x, size, stride, *, dtype=None):
    """Zeros of the dtype of `x`."""
    return new_zeros(x, size, dtype=dtype)


@lowering(aten.new_ones.default)
def new_ones(x, size, *, dtype=None):
    """Ones of the dtype of `x`."""
    return jnp.ones(tuple(size), x.dtype if dtype is None else to_jax(dtype))


@lowering(aten.new_full.default)
def new_full(x, size, fill_value, *, dtype=None):
    """One value, in the dtype of `x`."""
    dtype = x.dtype if dtype is None else to_jax(dtype)
    return jnp.broadcast_to(scalar(fill_value, dtype), tuple(size))


@lowering(aten.full.default)
def full(size, fill_value, *, dtype=None):
    """One value."""
    return jnp.broadcast_to(scalar(fill_value, _dtype(dtype, fill_value)), tuple(size))


@lowering(aten.scalar_tensor.default)
def scalar_tensor(s, *, dtype=None):
    """One number, 0-d."""
    return scalar(s, _dtype(dtype) if dtype is None else to_jax(dtype))


def _progression(start, step, length, dtype):
    """``start + i * step``; as torch does, integers are exact and others computed in float64."""
    if jnp.issubdtype(dtype, jnp.integer) and all(float(v).is_integer() for v in (start, step)):
        wide = np.int64 if dtype.itemsize == 8 or _overflows(start, step, length) else np.int32
    else:
        wide = np.int32 if _exact_in_float32(start, step, length) else np.float64
    kind = int if np.issubdtype(wide, np.integer) else float
    with jax.enable_x64(True):
        values = jnp.arange(length, dtype=wide)
        if step != 1:
            values = values * np.asarray(kind(step), wide)
        if start != 0:
            values = values + np.asarray(kind(start), wide)
        return values.astype(dtype)


def _overflows(start, step, length):
    return max(abs(start), abs(start + step * length), abs(step * length)) >= 2**31


def _exact_in_float32(start, step, length):
    return all(float(v).is_integer() for v in (start, step)) and not _overflows(start, step, length)


def _arange_plan(start, end, step=1, *, dtype=None):
    """Only the length and the dtype decide the program: ``torch.arange(i, i + n)`` in a loop compiles once."""
    dtype = _dtype(dtype, start, end, step)
    if dtype == np.int64:
        start, end, step = int(start), int(end), int(step)
        length = -((start - end) // step) if step else -1
    else:  # torch counts in float64, whatever the dtype
        span = float(end) - float(start)
        length = math.ceil(span / step) if step and math.isfinite(span) else -1
        kind = int if np.issubdtype(dtype, np.integer) else float
        start, step = kind(start), kind(step)
    return None if length < 0 else ((length, dtype), (start, step))


@lowering(aten.arange.start_step, prepare=_arange_plan)
def arange_step(length, dtype, start, step):
    """``start``, ``start + step``, ...: `length` numbers."""
    if isinstance(start, int | float):  # while tracing
        return _progression(start, step, length, dtype)
    wide = np.int64 if np.issubdtype(dtype, np.integer) else np.float64
    return (start.astype(wide) + step.astype(wide) * jnp.arange(length, dtype=wide)).astype(dtype)


@lowering(aten.arange.start, prepare=lambda start, end, *, dtype=None: _arange_plan(start, end, dtype=dtype))
def arange_start(length, dtype, start, step):
    """``start``, ``start + 1``, ...: `length` numbers."""
    return arange_step(length, dtype, start, step)


@lowering(aten.arange.default, prepare=lambda end, *, dtype=None: _arange_plan(0, end, dtype=dtype))
def arange(length, dtype, start, step):
    """``0, 1, ...``: `length` numbers."""
    return arange_step(length, dtype, start, step)


@lowering(aten.range.default, aten.range.step, static=("start", "end", "step"))
def range_inclusive(start, end, step=1, *, dtype=None):
    """``start``, ``start + step``, ... up to and including ``end``."""
    dtype = to_jax(torch.get_default_dtype() if dtype is None else dtype)
    return _progression(start, step, int((float(end) - float(start)) / float(step)) + 1, dtype)


def _spaced(start, end, steps, dtype):
    """`steps` values from `start` to `end`, computed from the nearer end, as torch does."""
    work = np.dtype(np.float64) if jnp.issubdtype(dtype, jnp.integer) else dtype
    with jax.enable_x64(work.itemsize >= 8):
        if work != dtype:  # torch rounds the ends, but not the steps between them
            start, end = cast(start, dtype), cast(end, dtype)
        start, end = scalar(start, work), scalar(end, work)
        if steps == 1:
            return start.reshape(1).astype(dtype)
        i = jnp.arange(steps, dtype=np.int32)
        # by a constant, XLA would multiply with its rounded reciprocal
        step = (end - start) / lax.optimization_barrier(scalar(max(steps - 1, 1), work))
        low, high = start + step * i.astype(work), end - step * (steps - 1 - i).astype(work)
        return jnp.where(i < steps // 2, low, high).astype(dtype)


def _linspace_dtype(dtype, start, end):
    if dtype is not None:
        return to_jax(dtype)
    complex_end = any(jnp.issubdtype(jnp.result_type(v), jnp.complexfloating) for v in (start, end))
    return _dtype(None, *([1j] if complex_end else []))


@lowering(aten.linspace.default, aten.linspace.Tensor_Tensor, aten.linspace.Tensor_Scalar, aten.linspace.Scalar_Tensor)
def linspace(start, end, steps, *, dtype=None):
    """`steps` values from `start` to `end`, both included."""
    return _spaced(start, end, steps, _linspace_dtype(dtype, start, end))


@lowering(aten.logspace.default, aten.logspace.Tensor_Tensor, aten.logspace.Tensor_Scalar, aten.logspace.Scalar_Tensor)
def logspace(start, end, steps, base=10.0, *, dtype=None):
    """`base` to the power of `steps` values from `start` to `end`."""
    dtype = _linspace_dtype(dtype, start, end)
    exact = jnp.issubdtype(dtype, jnp.integer) or (steps == 1 and jnp.issubdtype(dtype, jnp.floating))
    work = np.dtype(np.float64) if exact else dtype
    with jax.enable_x64(work.itemsize >= 8):
        if work != dtype and steps > 1:  # as for linspace
            start, end = (cast(v, dtype) for v in (start, end))
        if base < 0:
            base = complex(base) if jnp.issubdtype(work, jnp.complexfloating) else base
        return jnp.power(jnp.asarray(base, work), _spaced(start, end, steps, work)).astype(dtype)


@lowering(aten.eye.default, aten.eye.m)
def eye(n, m=None, *, dtype=None):
    """Ones on the diagonal."""
    return jnp.eye(n, m, dtype=_dtype(dtype))


def _triangle(rows, cols, dtype):
    return jnp.stack([jnp.asarray(rows), jnp.asarray(cols)]).astype(to_jax(dtype or torch.int64))


@lowering(aten.tril_indices.default)
def tril_indices(row, col, offset=0, *, dtype=torch.int64):
    """Row and column indices of the lower triangle."""
    return _triangle(*np.tril_indices(row, offset, col), dtype)


@lowering(aten.triu_indices.default)
def triu_indices(row, col, offset=0, *, dtype=torch.int64):
    """Row and column indices of the upper triangle."""
    return _triangle(*np.triu_indices(row, offset, col), dtype)
