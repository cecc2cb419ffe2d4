"""Dropout of attention weights: which weights are kept, computed anywhere from a seed and the weight's place.

The bits of a weight are a hash of its batch, head, query and key, so that kernels need no mask: forward and backward compute
the same bits, whatever their blocks and however many devices there are. The mixing function is the finalizer of MurmurHash3
(Appleby 2011, https://github.com/aappleby/smhasher), 32-bit integers that every platform multiplies alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .blocks import LANES

_KEYS = 3  # numbers of a head: for queries, for keys, and between the rounds


def _number(n: int) -> np.int32:
    return np.uint32(n).astype(np.int32)


_FIRST, _SECOND = _number(0x85EBCA6B), _number(0xC2B2AE35)
_STEP = _number(0x9E3779B9)  # the golden ratio: successive counters lie far apart


def _mixed(x: jax.Array, between: jax.Array | int = 0) -> jax.Array:
    """Every bit of the result hangs on every bit of `x`, int32."""
    x = (x ^ lax.shift_right_logical(x, jnp.full_like(x, 16))) * _FIRST + between
    x = (x ^ lax.shift_right_logical(x, jnp.full_like(x, 13))) * _SECOND
    return x ^ lax.shift_right_logical(x, jnp.full_like(x, 16))


def head_keys(seed: jax.Array, batch: int, heads: int) -> jax.Array:
    """What the bits of each head hang on, besides the place: ``int32[batch, heads, 1, 128]``, the first numbers of each row.

    Args:
        seed: ``int32[2]``.
        batch: how many batches there are, on all devices.
        heads: how many query heads.
    """
    shape = (batch, heads, 1, LANES)
    place = lax.broadcasted_iota(jnp.int32, shape, 0) * np.int32(heads) + lax.broadcasted_iota(jnp.int32, shape, 1)
    x = _mixed(place * _STEP + seed[0])
    return _mixed(x + lax.broadcasted_iota(jnp.int32, shape, 3) * _STEP + seed[1], seed[0])


def kept(keys: jax.Array, first_row: jax.Array | int, first_column: jax.Array | int, rows: int, columns: int, p: float):
    """Which weights of a block are kept.

    Args:
        keys: ``[..., 1, 128]`` of `head_keys`.
        first_row: the block's first query.
        first_column: the block's first key.
        rows: how many queries it has.
        columns: how many keys.
        p: the probability of being dropped, less than 1.

    Returns:
        bool ``[..., rows, columns]``.
    """
    lead = keys.shape[:-2]
    of_rows, of_columns, between = (keys[..., i : i + 1] for i in range(_KEYS))

    def along(first: jax.Array | int, shape: tuple[int, int], axis: int, key: jax.Array) -> jax.Array:
        counter = first + lax.broadcasted_iota(jnp.int32, (*lead, *shape), len(lead) + axis)
        return _mixed(counter * _STEP + jnp.broadcast_to(key, counter.shape))

    x = along(first_row, (rows, 1), 0, of_rows) + along(first_column, (1, columns), 1, of_columns)
    bits = _mixed(x, jnp.broadcast_to(between, x.shape))
    return bits >= threshold(p)


def threshold(p: float) -> np.int32:
    """The least int32 of a weight that is kept: they are `p` of all."""
    return np.int32(min(round(p * 2.0**32), 2**32 - 1) - 2**31)


def dense(seed: jax.Array, batch: int, heads: int, queries: int, keys: int, p: float) -> jax.Array:
    """Which weights are kept, ``bool[batch, heads, queries, keys]``."""
    with jax.enable_x64(False):
        return kept(head_keys(seed, batch, heads), 0, 0, queries, keys, p)
