"""segment_reduce: reductions over consecutive pieces of one dimension."""

import jax.numpy as jnp
import numpy as np
from torchax.ops import aten, lowering

from ._index import dimension, highest, lowest
from .search import _search


def _segments(data, lengths, offsets, axis):
    """Data as ``(rows, n, *rest)``; the segment of each element (their number for none); lengths ``(rows, segments)``."""
    axis = dimension(axis, data.ndim)
    if lengths is None:
        lengths = jnp.diff(offsets, axis=-1)
    rows = int(np.prod(data.shape[:axis]))
    flat = data.reshape(rows, *data.shape[axis:])
    lengths = jnp.broadcast_to(lengths, (*data.shape[:axis], lengths.shape[-1])).reshape(rows, -1).astype(jnp.int32)
    places = jnp.broadcast_to(jnp.arange(flat.shape[1], dtype=jnp.int32), flat.shape[:2])
    return flat, _search(jnp.cumsum(lengths, -1), places, True), lengths


def _wide(a, ndim):
    """Trailing dimensions of 1 added."""
    return a.reshape(*a.shape, *(1,) * (ndim - a.ndim))


@lowering(aten.segment_reduce.default, static=("initial",))
def segment_reduce(data, reduce, *, lengths=None, indices=None, offsets=None, axis=0, unsafe=False, initial=None):
    """``sum``, ``mean``, ``prod``, ``max`` or ``min`` over consecutive pieces of `data` along `axis`."""
    flat, segment, lengths = _segments(data, lengths, offsets, axis)
    neutral = {"max": lowest(data.dtype), "min": highest(data.dtype), "prod": 1}.get(reduce, 0)
    start = neutral if initial is None else initial
    rows = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    at = jnp.full((flat.shape[0], lengths.shape[1], *flat.shape[2:]), start, data.dtype).at[rows, segment]
    update = {"max": at.max, "min": at.min, "prod": at.multiply}.get(reduce, at.add)
    result = update(flat, mode="drop")
    if reduce == "mean":
        count = _wide(lengths, result.ndim).astype(data.dtype)
        result = result / count if initial is None else jnp.where(count > 0, result / count, result)
    axis = dimension(axis, data.ndim)
    return result.reshape(*data.shape[:axis], lengths.shape[1], *data.shape[axis + 1 :])


@lowering(aten._segment_reduce_backward.default, static=("initial",))
def segment_reduce_backward(grad, output, data, reduce, *, lengths=None, offsets=None, axis=0, initial=None):
    """Gradient of `segment_reduce`; equal extremes share it."""
    flat, segment, lengths = _segments(data, lengths, offsets, axis)
    rows = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    shape = (flat.shape[0], lengths.shape[1], *flat.shape[2:])

    def spread(values, fill=0):
        """Each element's segment's value."""
        return values.reshape(shape).at[rows, segment].get(mode="fill", fill_value=fill)

    def total(values):
        """Each segment's sum."""
        return jnp.zeros(shape, values.dtype).at[rows, segment].add(values, mode="drop")

    result = spread(grad)
    if reduce == "mean":
        result = result / spread(jnp.broadcast_to(_wide(lengths, len(shape)), shape).astype(data.dtype), 1)
    elif reduce in ("max", "min"):
        extreme = (flat == spread(output)) | jnp.isnan(flat)
        result = jnp.where(extreme, result / jnp.maximum(spread(total(extreme.astype(data.dtype)), 1), 1), 0)
    elif reduce == "prod":
        zero = flat == 0
        zeros = spread(total(zero.astype(data.dtype)))
        start = jnp.full(shape, 1 if initial is None else initial, data.dtype)
        rest = spread(start.at[rows, segment].multiply(jnp.where(zero, 1, flat), mode="drop"))
        others = jnp.where(
            zeros == 0, spread(output) / jnp.where(zero, 1, flat), jnp.where(zero & (zeros == 1), rest, 0)
        )
        result = result * others
    return result.reshape(data.shape)
