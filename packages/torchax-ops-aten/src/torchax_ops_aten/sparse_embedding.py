"""Bags of embeddings: rows of a table, summed, averaged or maximized per bag."""

import jax
import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering

from ._index import check_range
from .norm import wide

_SUM, _MEAN, _MAX = 0, 1, 2


def _bags(offsets, count: int):
    """The bag of each of `count` positions, int32."""
    positions = lax.broadcasted_iota(jnp.int32, (count,), 0)
    return jnp.searchsorted(offsets.astype(jnp.int32), positions, side="right").astype(jnp.int32) - 1


def _counted(indices, padding_idx: int):
    return indices != padding_idx if padding_idx >= 0 else jnp.ones(indices.shape, bool)


@lowering(aten._embedding_bag.default, aten._embedding_bag_forward_only.default, checks=True)
def embedding_bag(
    weight,
    indices,
    offsets,
    scale_grad_by_freq=False,
    mode=0,
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=-1,
):
    """Bags, the bag of each index, the size of each bag, and the rows that hold the maxima."""
    count = indices.shape[0]
    bags = offsets.shape[0] - (1 if include_last_offset else 0)
    bag = _bags(offsets[:bags], count)
    rows = weight.shape[0]
    message = f"Index of input takes value {{}} which is not in the valid range [0, {rows})"
    check_range(indices, rows, error=RuntimeError, message=message)
    counted = _counted(indices, padding_idx)
    if include_last_offset:
        counted &= lax.broadcasted_iota(jnp.int32, (count,), 0) < offsets[-1]
    bag = jnp.where(counted, bag, bags)  # a bag too many takes what is left out
    rows = wide(jnp.take(weight, indices, axis=0))
    sizes = jax.ops.segment_sum(counted.astype(jnp.int32), bag, bags + 1)[:bags]
    taken = jnp.zeros((0,), indices.dtype)
    if mode == _MAX:
        out, taken = _maxima(rows, indices, bag, bags)
        out = jnp.where((sizes > 0)[:, None], out, 0)
    else:
        if per_sample_weights is not None:
            rows = rows * wide(per_sample_weights)[:, None]
        out = jax.ops.segment_sum(rows, bag, bags + 1)[:bags]
        if mode == _MEAN:
            out = out / jnp.maximum(sizes, 1)[:, None].astype(out.dtype)
    return out, bag, jnp.pad(sizes, (0, offsets.shape[0] - bags)), taken


def _maxima(rows, indices, bag, bags: int):
    """Maximum of each bag and feature, and the index of the row where it was first found."""
    count = rows.shape[0]
    if count == 0:
        return jnp.zeros((bags, rows.shape[1]), rows.dtype), jnp.zeros((bags, rows.shape[1]), indices.dtype)
    out = jax.ops.segment_max(rows, bag, bags + 1)
    order = lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    first = jax.ops.segment_min(jnp.where(rows == out[bag], order, count - 1), bag, bags + 1)[:bags]
    return out[:bags], jnp.take(indices, jnp.clip(first, 0, count - 1), axis=0)


@lowering(aten._embedding_bag_dense_backward.default)
def embedding_bag_dense_backward(
    grad,
    indices,
    offset2bag,
    bag_size,
    maximum_indices,
    num_weights,
    scale_grad_by_freq,
    mode,
    per_sample_weights,
    padding_idx=-1,
):
    """Gradient of the table."""
    bags, features = grad.shape
    grad_wide = wide(grad)
    table = jnp.zeros((num_weights, features), grad_wide.dtype)
    if mode == _MAX:
        filled = (bag_size[:bags] > 0)[:, None]
        columns = lax.broadcasted_iota(jnp.int32, (1, features), 1)
        return table.at[maximum_indices, columns].add(jnp.where(filled, grad_wide, 0))
    counted = _counted(indices, padding_idx) & (offset2bag < bags)
    if mode == _MEAN:
        grad_wide = grad_wide / jnp.maximum(bag_size[:bags], 1)[:, None].astype(grad_wide.dtype)
    rows = jnp.take(grad_wide, offset2bag, axis=0, mode="clip")
    if per_sample_weights is not None:
        rows = rows * wide(per_sample_weights)[:, None]
    if scale_grad_by_freq:
        uses = jnp.zeros((num_weights,), jnp.int32).at[indices].add(1)
        rows = rows / jnp.maximum(uses[indices], 1)[:, None].astype(rows.dtype)
    return table.at[indices].add(jnp.where(counted[:, None], rows, 0))


def _dense(*args, **kwargs):
    return not args[9]


@lowering(aten._embedding_bag_backward.default, when=_dense)
def embedding_bag_backward(
    grad,
    indices,
    offsets,
    offset2bag,
    bag_size,
    maximum_indices,
    num_weights,
    scale_grad_by_freq,
    mode,
    sparse,
    per_sample_weights,
    padding_idx=-1,
):
    """Gradient of the table."""
    return embedding_bag_dense_backward(
        grad,
        indices,
        offset2bag,
        bag_size,
        maximum_indices,
        num_weights,
        scale_grad_by_freq,
        mode,
        per_sample_weights,
        padding_idx,
    )


@lowering(aten._embedding_bag_per_sample_weights_backward.default)
def embedding_bag_per_sample_weights_backward(grad, weight, indices, offsets, offset2bag, mode, padding_idx=-1):
    """Gradient of the weights of the samples."""
    counted = _counted(indices, padding_idx) & (offset2bag < grad.shape[0])
    products = jnp.take(wide(grad), offset2bag, axis=0, mode="clip") * wide(jnp.take(weight, indices, axis=0))
    return jnp.where(counted, products.sum(-1), 0)
