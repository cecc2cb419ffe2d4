"""Reading and writing through index tensors and masks."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering, raise_if

from ._index import (
    at_least_1d,
    check_elements,
    check_range,
    dimension,
    highest,
    is_half,
    lowest,
    narrow,
    opmath,
    scalar,
    wrap,
)

_MASKS = (jnp.bool_, jnp.uint8)  # torch still takes uint8 index tensors for masks


def _is_mask(index):
    return index is not None and index.dtype in _MASKS


def has_mask(x, indices, *args, **kwargs):
    """Whether an index tensor is a mask, so that the number of selected elements depends on values."""
    return any(map(_is_mask, indices))


def _basic(x, indices):
    """Index tensors as JAX takes them: a slice for None, negative values wrapped."""
    return tuple(slice(None) if i is None else wrap(i, x.shape[d]) for d, i in enumerate(indices))


def _check(x, indices):
    for d, index in enumerate(indices):
        if index is not None and not _is_mask(index):
            check_range(index, x.shape[d], d, negative=True)


def _without_masks(indices, nonzero):
    """Each mask replaced by the index tensors of its True elements, which ``nonzero(mask)`` finds."""
    plain = []
    for index in indices:
        plain.extend(nonzero(index) if _is_mask(index) else (index,))
    return plain


@lowering(aten.index.Tensor, aten._unsafe_index.Tensor, checks=True)
def index_tensor(x, indices):
    """``x[indices]``, None for a whole dimension."""
    _check(x, indices)
    index = _basic(x, indices)
    if not x.size:
        return jnp.zeros(_selection(x.shape, indices)[0], x.dtype)
    return x.at[index].get(mode="clip", wrap_negative_indices=False)


def _selection(shape, indices):
    """Shape of ``x[indices]``, and where the broadcast index dimensions begin and end in it."""
    at = [d for d, i in enumerate(indices) if i is not None]
    common = np.broadcast_shapes(*(indices[d].shape for d in at))
    rest = [n for d, n in enumerate(shape) if d not in at]
    adjacent = at == list(range(at[0], at[0] + len(at)))
    start = at[0] if adjacent else 0
    return (*rest[:start], *common, *rest[start:]), start, start + len(common)


@lowering(aten.index.Tensor, aten._unsafe_index.Tensor, kind="dynamic", when=has_mask, priority=1)
def index_mask(x, indices):
    """``x[indices]`` with masks among the indices."""
    plain = _without_masks(indices, lambda mask: np.nonzero(np.asarray(mask)))
    if _on_host(x):  # every number of elements would be another program
        return np.asarray(x)[tuple(slice(None) if i is None else np.asarray(i) for i in plain)]
    return index_tensor(x, [None if i is None else jnp.asarray(i) for i in plain])


def _on_host(x):
    return all(device.platform == "cpu" for device in x.devices())


@lowering(aten.index_put.default, aten._unsafe_index_put.default, aten._index_put_impl.default, checks=True)
def index_put(x, indices, values, accumulate=False, unsafe=False):
    """`x` with `values` written to (or added at) ``x[indices]``; of equal positions the last wins."""
    del unsafe
    values = values.astype(x.dtype)
    _check(x, indices)
    if not x.size:
        return x
    masks = [d for d, i in enumerate(indices) if _is_mask(i)]
    if masks:
        if len([i for i in indices if i is not None]) == 1:
            return _put_mask(x, masks[0], indices[masks[0]] != 0, values, accumulate)
        indices = _positions(x, indices, values)
    return _put(x, _basic(x, indices), values, accumulate)


def _put(x, index, values, accumulate):
    at = x.at[index]
    if not accumulate:
        return at.set(values, mode="drop", wrap_negative_indices=False)
    if x.dtype == jnp.bool_:
        return at.max(values, mode="drop", wrap_negative_indices=False)
    return at.add(values, mode="drop", wrap_negative_indices=False)


def _put_mask(x, dim, mask, values, accumulate):
    """`values` written where `mask`, which stands for dimensions from `dim` on, is True; static shapes throughout."""
    after = x.ndim - dim - mask.ndim
    mask = lax.expand_dims(mask, tuple(range(mask.ndim, mask.ndim + after)))
    values = values.reshape((1,) * max(0, dim + 1 + after - values.ndim) + values.shape)
    shape = values.shape
    picked = shape[dim]
    if picked == 1:
        values = values.reshape(*shape[:dim], *(1,) * (mask.ndim - after), *shape[dim + 1 :])
    else:  # the n-th True takes the n-th value
        flat = mask.reshape(-1)
        rank = jnp.clip(jnp.cumsum(flat, dtype=jnp.int32) - 1, 0, max(picked - 1, 0))
        if not picked:
            return x
        values = jnp.take(values, rank, dim, mode="clip")
        values = values.reshape(*shape[:dim], *mask.shape[: mask.ndim - after], *shape[dim + 1 :])
    if accumulate:
        values = x | values if x.dtype == jnp.bool_ else x + values
    return jnp.where(mask, values, x)


def _positions(x, indices, values):
    """Masks among other indices: the positions of True elements, as many as `values` or the other indices say."""
    counts = [i.size for i in indices if i is not None and not _is_mask(i) and i.ndim == 1 and i.size != 1]
    if not counts:
        shape, start, _ = _selection(
            x.shape, _without_masks(indices, lambda mask: (jnp.zeros((2,), jnp.int32),) * mask.ndim)
        )
        values_at = start - len(shape) + values.ndim
        counts = [n for n in values.shape[values_at : values_at + 1] if n != 1 and values_at >= 0]
    out_of_range = max(x.shape)

    def nonzero(mask):
        return jnp.nonzero(mask, size=counts[0] if counts else mask.size, fill_value=out_of_range)

    return _without_masks(indices, nonzero)


@lowering(aten.index_select.default, checks=True)
def index_select(x, dim, index):
    """Slices of `x` along `dim`, in the order of `index`."""
    if x.ndim == 0:
        return x
    dim = dimension(dim, x.ndim)
    check_range(index, x.shape[dim], message="index out of range in self")
    if not x.size:
        return jnp.zeros((*x.shape[:dim], index.size, *x.shape[dim + 1 :]), x.dtype)
    return jnp.take(x, narrow(index.reshape(-1), x.shape[dim]), dim, mode="clip")


def _along(x, dim, index, **check):
    """`x` at least 1-d and the index expression of slices along `dim`."""
    dim = dimension(dim, x.ndim)
    full = at_least_1d(x)
    check_range(index, full.shape[dim], dim, **check)
    return full, (*(slice(None),) * dim, wrap(index.reshape(-1), full.shape[dim]))


def _sources(x, dim, source):
    """A 0-d (or too short) source brought to the number of dimensions of `x`."""
    if source.ndim == 0:
        return source.reshape((1,) * max(x.ndim, 1))
    return source


@lowering(aten.index_add.default, checks=True)
def index_add(x, dim, index, source, alpha=1):
    """`x` with slices of `source` (times `alpha`) added at `index` along `dim`."""
    full, at = _along(x, dim, index, error=RuntimeError)
    source = _sources(x, dim, source)
    along = dimension(dim, x.ndim)
    slices = (*full.shape[:along], index.size, *full.shape[along + 1 :])
    if source.shape != slices:
        raise RuntimeError(f"source of shape {source.shape} for slices of shape {slices}")
    if not (isinstance(alpha, (int, float)) and alpha == 1):
        source = source * scalar(alpha, source.dtype)
    if x.dtype == jnp.bool_:
        return full.at[at].max(source, mode="drop", wrap_negative_indices=False).reshape(x.shape)
    return full.at[at].add(source.astype(x.dtype), mode="drop", wrap_negative_indices=False).reshape(x.shape)


@lowering(aten.index_copy.default, checks=True)
def index_copy(x, dim, index, source):
    """`x` with slices of `source` written at `index` along `dim`."""
    full, at = _along(x, dim, index)
    values = _sources(x, dim, source).astype(x.dtype)
    return full.at[at].set(values, mode="drop", wrap_negative_indices=False).reshape(x.shape)


@lowering(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, checks=True)
def index_fill(x, dim, index, value):
    """`x` with `value` in the slices at `index` along `dim`."""
    full, at = _along(x, dim, index, negative=True)
    values = scalar(value, x.dtype)
    return full.at[at].set(values, mode="drop", wrap_negative_indices=False).reshape(x.shape)


@lowering(aten.index_reduce.default, checks=True)
def index_reduce(x, dim, index, source, reduce, include_self=True):
    """`x` with slices of `source` reduced into it at `index` along `dim`."""
    full, at = _along(x, dim, index, message="index out of range in self")
    source = _sources(x, dim, source).astype(x.dtype)
    return reduce_at(full, at, source, reduce, include_self).reshape(x.shape)


def reduce_at(x, at, source, reduce, include_self):
    """`source` reduced into ``x[at]`` by ``sum``, ``prod``, ``mean``, ``amax`` or ``amin``."""
    options = {"mode": "drop", "wrap_negative_indices": False}
    if not include_self:
        x = x.at[at].set(_identity(reduce, x.dtype), **options)
    if reduce in ("amax", "amin"):
        return x.at[at].max(source, **options) if reduce == "amax" else x.at[at].min(source, **options)
    if reduce in ("prod", "multiply"):
        return x.at[at].min(source, **options) if x.dtype == jnp.bool_ else x.at[at].multiply(source, **options)
    if reduce != "mean":
        return x.at[at].max(source, **options) if x.dtype == jnp.bool_ else x.at[at].add(source, **options)
    total = x.at[at].add(source, **options)
    start = jnp.ones if include_self else jnp.zeros
    count = start(x.shape, jnp.int32).at[at].add(1, **options)
    count = jnp.maximum(count, 1).astype(x.dtype)
    return total // count if jnp.issubdtype(x.dtype, jnp.integer) else total / count


def _identity(reduce, dtype):
    if reduce in ("prod", "multiply"):
        return np.ones((), dtype)
    return {"amax": lowest, "amin": highest}.get(reduce, lambda d: np.zeros((), d))(dtype)


@lowering(aten.put.default, checks=True)
def put(x, index, source, accumulate=False):
    """`x` with `source` written to (or added at) positions of the flattened `x`."""
    flat = x.reshape(-1)
    check_elements(index, flat.size)
    at = wrap(index.reshape(-1), flat.size)
    return _put(flat, (at,), source.reshape(-1).astype(x.dtype), accumulate).reshape(x.shape)


@lowering(aten.masked_scatter.default, checks=True)
def masked_scatter(x, mask, source):
    """`x` with the first elements of `source` where `mask` is True, in order."""
    if mask.dtype != jnp.bool_:
        raise RuntimeError(f"a mask of {mask.dtype}")
    shape = np.broadcast_shapes(x.shape, mask.shape)
    if not math.prod(shape) or not source.size:
        return jnp.broadcast_to(x, shape)
    mask = jnp.broadcast_to(mask, shape)
    rank = jnp.cumsum(mask.reshape(-1), dtype=jnp.int32) - 1
    raise_if(
        rank[-1] >= source.size, RuntimeError, "masked_scatter: Number of elements of source < number of ones in mask"
    )
    values = source.reshape(-1).astype(x.dtype).at[rank].get(mode="clip", wrap_negative_indices=False)
    return jnp.where(mask, values.reshape(shape), x)


@lowering(aten.masked_scatter_backward.default)
def masked_scatter_backward(grad_output, mask, sizes):
    """Gradient of ``masked_scatter`` for its source: the masked gradients in order, then zeros."""
    n = math.prod(sizes)
    flat = jnp.broadcast_to(mask, grad_output.shape).reshape(-1)
    at = jnp.where(flat, jnp.cumsum(flat, dtype=jnp.int32) - 1, n)
    source = jnp.zeros((n,), grad_output.dtype)
    return source.at[at].set(grad_output.reshape(-1), mode="drop").reshape(tuple(sizes))


@lowering(aten.masked_select.default, kind="dynamic")
def masked_select(x, mask):
    """The elements where `mask` is True, 1-d."""
    shape = np.broadcast_shapes(x.shape, mask.shape)
    mask = np.broadcast_to(np.asarray(mask), shape).reshape(-1)
    if _on_host(x):
        return np.broadcast_to(np.asarray(x), shape).reshape(-1)[mask]
    return jnp.broadcast_to(x, shape).reshape(-1)[jnp.asarray(np.flatnonzero(mask))]


@lowering(aten.nonzero.default, kind="dynamic")
def nonzero(x):
    """Indices of the elements that are not zero, ``(n, dimensions)``."""
    values = np.asarray(x)
    if values.ndim == 0:
        return np.zeros((int(values != 0), 0), np.int64)
    return np.argwhere(values != 0)  # column after column in memory, as torch's


@lowering(aten.nonzero_static.default, meta=False)  # torch's meta kernel gives the strides of CUDA
def nonzero_static(x, *, size, fill_value=-1):
    """The first `size` indices of elements that are not zero, filled up with `fill_value`."""
    if x.ndim == 0:
        return jnp.zeros((size, 0), jnp.int64)
    found = jnp.nonzero(x.reshape(-1) != 0, size=size, fill_value=x.size)[0]
    where = jnp.stack(jnp.unravel_index(found, x.shape) if x.size else [found] * x.ndim, 1)
    return jnp.where(found[:, None] < x.size, where, fill_value).astype(jnp.int64)


@lowering(aten.embedding.default, checks=True)
def embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    """Rows of `weight`."""
    check_range(indices, weight.shape[0], message="index out of range in self")
    return jnp.take(weight, narrow(indices, weight.shape[0]), 0, mode="clip")


def knows_classes(x, num_classes=-1):
    """Whether the number of classes is given."""
    return num_classes > 0


@lowering(aten.one_hot.default, whole=True, when=knows_classes, checks=True)
def one_hot(x, num_classes=-1):
    """1 at the class that `x` names, else 0, in a last dimension of `num_classes`."""
    raise_if(x < 0, RuntimeError, "Class values must be non-negative.")
    raise_if(x >= num_classes, RuntimeError, "Class values must be smaller than num_classes.")
    return (x[..., None] == jnp.arange(num_classes)).astype(jnp.int32)


@lowering(aten.embedding_renorm.default, checks=True)
def embedding_renorm(weight, indices, max_norm, norm_type):
    """`weight` with the rows that `indices` names scaled to at most `max_norm`."""
    check_range(indices, weight.shape[0], message="index out of range in self")
    at = narrow(indices.reshape(-1), weight.shape[0])
    rows = jnp.take(weight, at, 0, mode="clip").astype(opmath(weight.dtype))
    norms = jnp.linalg.vector_norm(rows, ord=norm_type, axis=1, keepdims=True)
    rows = jnp.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)), rows)
    return weight.at[at].set(rows.astype(weight.dtype), mode="drop", wrap_negative_indices=False)


@lowering(aten.embedding_dense_backward.default)
def embedding_dense_backward(grad_output, indices, num_weights, padding_idx, scale_grad_by_freq):
    """Gradient of ``embedding`` for its weight; the row of `padding_idx` gets none."""
    width = grad_output.shape[-1] if grad_output.ndim > indices.ndim else 1
    at = narrow(indices.reshape(-1), num_weights)
    if padding_idx >= 0:
        at = jnp.where(at == padding_idx, num_weights, at)
    options = {"mode": "drop", "wrap_negative_indices": False}
    grad = grad_output.reshape(at.size, width).astype(opmath(grad_output.dtype))
    if scale_grad_by_freq:
        counts = jnp.zeros((num_weights,), grad.dtype).at[at].add(1, **options)
        grad = grad / counts.at[at].get(mode="clip", wrap_negative_indices=False)[:, None]
    total = jnp.zeros((num_weights, width), grad.dtype).at[at].add(grad, **options)
    return total.astype(grad_output.dtype) if is_half(grad_output.dtype) else total
