"""Helpers for lowerings that work with dimensions and indices."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torchax.dtypes import to_jax, to_torch
from torchax.ops import raise_if

INT32_MAX = 2**31 - 1


def dimension(dim, ndim):
    """A dimension counted from the end, counted from the start; a 0-d array counts as 1-d."""
    return dim % max(ndim, 1)


def at_least_1d(x):
    """A 0-d array as one of a single element, as torch's dimension-wise ops see it."""
    return x.reshape(1) if x.ndim == 0 else x


def iota(n, ndim=1, dim=0):
    """0 .. n-1 along dimension `dim` of `ndim`; int32, since 64-bit integers are slow where they are emulated."""
    shape = [1] * ndim
    shape[dim] = n
    return jnp.arange(n, dtype=jnp.int32).reshape(shape)


def narrow(index, size):
    """Index values in int32 where `size` fits."""
    return index.astype(jnp.int32) if size <= INT32_MAX and index.dtype != jnp.int32 else index


def wrap(index, size):
    """Negative index values counted from the end."""
    if jnp.issubdtype(index.dtype, jnp.unsignedinteger):
        return narrow(index, size)
    index = narrow(index, size)
    return jnp.where(index < 0, index + size, index)


def check_range(index, size, dim=0, error: type[Exception] = IndexError, message="", negative=False):
    """State that every index lies in ``[0, size)``, or in ``[-size, size)`` where `negative` ones count from the end."""
    bad = index >= size
    if not jnp.issubdtype(index.dtype, jnp.unsignedinteger):
        bad |= index < (-size if negative else 0)
    raise_if(bad, error, message or f"index {{}} is out of bounds for dimension {dim} with size {size}", index)


def check_elements(index, size):
    """State that every index is one of a flattened array of `size` elements, negative ones counted from the end."""
    message = f"out of range: tried to access index {{}} on a tensor of {size} elements."
    check_range(index, size, message=message, negative=True)


def position(index, size):
    """An ``int`` argument as a position from the start; run-time value or Python number."""
    if isinstance(index, int):
        return index + size if index < 0 else index
    index = jnp.asarray(index)
    return jnp.where(index < 0, index + size, index).astype(jnp.int32)


def bound(index, size, default) -> Any:
    """A slice bound as Python clips it: negative from the end, then into ``[0, size]``."""
    if index is None:
        return default
    if isinstance(index, int):
        return min(max(index + size if index < 0 else index, 0), size)
    index = jnp.asarray(index)
    return jnp.clip(jnp.where(index < 0, index + size, index), 0, size).astype(jnp.int32)


def scalar(value, dtype):
    """A number (Python's or a run-time value) in `dtype`; integers wrap, as in torch."""
    if isinstance(value, (bool, int)) and jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(np.asarray(value % 2**64, np.uint64).astype(dtype))
    return jnp.asarray(value).astype(dtype)


def result_dtype(*arrays):
    """torch's promotion among tensors that have dimensions."""
    dtype = to_torch(arrays[0].dtype)
    for array in arrays[1:]:
        dtype = torch.promote_types(dtype, to_torch(array.dtype))
    return to_jax(dtype)


def is_half(dtype):
    """Whether CPU torch computes this dtype in float32."""
    return dtype in (jnp.bfloat16, jnp.float16)


def opmath(dtype):
    """The dtype in which torch computes: float32 for the half-width ones."""
    return np.dtype(np.float32) if is_half(dtype) else np.dtype(dtype)


def lowest(dtype):
    """The smallest value, -inf for floats."""
    if dtype == jnp.bool_:
        return np.asarray(False)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(-math.inf, dtype)
    return np.asarray(jnp.iinfo(dtype).min, dtype)


def highest(dtype):
    """The largest value, inf for floats."""
    if dtype == jnp.bool_:
        return np.asarray(True)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(math.inf, dtype)
    return np.asarray(jnp.iinfo(dtype).max, dtype)
