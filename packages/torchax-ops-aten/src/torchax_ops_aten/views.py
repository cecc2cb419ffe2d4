"""Views: how each is read from its base, and how a new value of the view is written into the base."""

import itertools

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.dtypes import to_jax
from torchax.ops import aten, lowering, view_lowering


# ---------------------------------------------------------------------- shape only
@view_lowering(aten.view.default, aten._reshape_alias.default, aten._unsafe_view.default)
def view(x, size, *_):
    """The same elements in another shape."""
    return x.reshape(size)


@view.inverse
def _(base, value, size, *_):
    return value.reshape(base.shape)


@view_lowering(aten.unsqueeze.default)
def unsqueeze(x, dim):
    """A dimension of size one, inserted."""
    return jnp.expand_dims(x, dim)


@unsqueeze.inverse
def _(base, value, dim):
    return value.reshape(base.shape)


@view_lowering(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(x, dims=None):
    """Dimensions of size one, taken out: all of them, or those named."""
    if dims is None:
        return jnp.squeeze(x)
    named = dims if isinstance(dims, tuple) else (dims,)
    return jnp.squeeze(x, tuple({d % x.ndim for d in named if x.ndim and x.shape[d] == 1}))


@squeeze.inverse
def _(base, value, dims=None):
    return value.reshape(base.shape)


# ---------------------------------------------------------------------- order of dimensions
@view_lowering(aten.t.default)
def t(x):
    """The transpose of a matrix; vectors as they are."""
    return x.T


@t.inverse
def _(base, value):
    return value.T


@view_lowering(aten.transpose.int)
def transpose(x, dim0, dim1):
    """Two dimensions exchanged."""
    return jnp.swapaxes(x, dim0, dim1) if x.ndim else x


@transpose.inverse
def _(base, value, dim0, dim1):
    return jnp.swapaxes(value, dim0, dim1) if value.ndim else value


@view_lowering(aten.permute.default)
def permute(x, dims):
    """Dimensions in another order."""
    return jnp.transpose(x, dims)


@permute.inverse
def _(base, value, dims):
    return jnp.transpose(value, np.argsort([d % value.ndim for d in dims]).tolist()) if value.ndim else value


# ---------------------------------------------------------------------- parts
@view_lowering(aten.select.int)
def select(x, dim, index):
    """One index of a dimension."""
    return lax.dynamic_index_in_dim(x, index, dim, keepdims=False)


@select.inverse
def _(base, value, dim, index):
    return lax.dynamic_update_index_in_dim(base, value, index, dim)


@select.prepare
def _(shape, strides, dim, index):
    rank = len(shape)
    if type(dim) is not int or type(index) is not int or not -rank <= dim < rank:
        return None
    dim %= rank
    size = shape[dim]
    if not -size <= index < size:
        return None
    index %= size
    return (dim,), (index,), index * strides[dim]


@view_lowering(aten.slice.Tensor)
def slice_(x, dim, length, step, start):
    """Every step-th index of a dimension from `start` on, `length` of them."""
    if step == 1:
        return lax.dynamic_slice_in_dim(x, start, length, dim)
    return jnp.take(x, start + step * np.arange(length, dtype=np.int32), axis=dim, mode="clip")


@slice_.inverse
def _(base, value, dim, length, step, start):
    if step == 1:
        return lax.dynamic_update_slice_in_dim(base, value, start, dim)
    where = (slice(None),) * dim + (start + step * np.arange(length, dtype=np.int32),)
    return base.at[where].set(value, mode="promise_in_bounds", unique_indices=True)


@slice_.prepare
def _(shape, strides, dim=0, start=None, end=None, step=1):
    rank = len(shape)
    if type(dim) is not int or not -rank <= dim < rank or type(step) is not int or step < 1:
        return None
    dim %= rank
    size = shape[dim]
    start = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
    end = size if end is None else min(max(end + size if end < 0 else end, start), size)
    if start == 0 and end == size and step == 1:
        return (dim, size, 1), (), 0
    length = (max(end - start, 0) + step - 1) // step
    return (dim, length, step), (start,), start * strides[dim]


@view_lowering(aten.diagonal.default)
def diagonal(x, offset=0, dim1=0, dim2=1):
    """A diagonal of two dimensions, as the last dimension."""
    return jnp.diagonal(x, offset, dim1, dim2)


@diagonal.inverse
def _(base, value, offset=0, dim1=0, dim2=1):
    moved = jnp.moveaxis(base, (dim1, dim2), (-2, -1))
    n = np.arange(value.shape[-1], dtype=np.int32)
    moved = moved.at[..., n + max(-offset, 0), n + max(offset, 0)].set(value, unique_indices=True)
    return jnp.moveaxis(moved, (-2, -1), (dim1, dim2))


@view_lowering(aten.unfold.default)
def unfold(x, dim, size, step):
    """Windows of `size` elements, every `step` of them, along a dimension; elements of a window as the last one."""
    if not x.ndim:
        return x.reshape(1)[:size]
    dim %= x.ndim
    windows = jnp.take(x, _windows(x.shape[dim], size, step), axis=dim, mode="clip")
    return jnp.moveaxis(windows, dim + 1, -1)


@unfold.inverse
def _(base, value, dim, size, step):
    if not base.ndim:
        return value.reshape(()) if size else base
    dim %= base.ndim
    where = (slice(None),) * dim + (_windows(base.shape[dim], size, step),)
    return base.at[where].set(jnp.moveaxis(value, -1, dim + 1))


def _windows(length, size, step):
    count = (length - size) // step + 1
    return np.arange(count, dtype=np.int32)[:, None] * step + np.arange(size, dtype=np.int32)


# ---------------------------------------------------------------------- several aliases
@lowering(aten.split.Tensor, aten.unsafe_split.Tensor, kind="views")
def split(shape, split_size, dim=0):
    """Slices of `split_size`, the last one smaller."""
    if not shape or not -len(shape) <= dim < len(shape) or split_size < 0:
        return None
    size = shape[dim]
    if split_size == 0:
        return [(aten.slice.Tensor, dim, 0, 0, 1)] if size == 0 else None
    starts = range(0, size, split_size) if size else [0]
    return [(aten.slice.Tensor, dim, i, min(i + split_size, size), 1) for i in starts]


@lowering(aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default, kind="views")
def split_with_sizes(shape, split_sizes, dim=0):
    """Slices of the given sizes."""
    if (
        not shape
        or not -len(shape) <= dim < len(shape)
        or sum(split_sizes) != shape[dim]
        or min(split_sizes, default=0) < 0
    ):
        return None
    ends = np.cumsum([0, *split_sizes]).tolist()
    return [(aten.slice.Tensor, dim, a, b, 1) for a, b in itertools.pairwise(ends)]


@lowering(aten.unbind.int, kind="views")
def unbind(shape, dim=0):
    """Each index of a dimension."""
    if not shape or not -len(shape) <= dim < len(shape):
        return None
    return [(aten.select.int, dim, i) for i in range(shape[dim])]


# ---------------------------------------------------------------------- one element, many times
@view_lowering(aten.expand.default)
def expand(x, size):
    """Broadcast; -1 keeps a dimension."""
    lead = len(size) - x.ndim
    return jnp.broadcast_to(x, tuple(x.shape[i - lead] if n == -1 else n for i, n in enumerate(size)))


@expand.inverse
def _(base, value, size):
    """The copies are one element: whichever was written, through a view of the expanded tensor, decides."""
    if not value.size:
        return base
    lead = value.ndim - base.ndim
    repeated = [i for i, n in enumerate(value.shape) if i < lead or (base.shape[i - lead] == 1 and n != 1)]
    if not repeated:
        return value.reshape(base.shape)
    front = range(len(repeated))
    copies = jnp.moveaxis(value, repeated, front)
    before = jnp.moveaxis(jnp.broadcast_to(base, value.shape), repeated, front)
    rest = copies.shape[len(repeated) :]
    written = jnp.argmax(_differ(copies, before).reshape(-1, *rest), axis=0)
    return jnp.take_along_axis(copies.reshape(-1, *rest), written[None], axis=0).reshape(base.shape)


def _differ(a, b):
    """Elementwise, whether the bits differ: NaN is itself here."""
    if jnp.iscomplexobj(a):
        return _differ(a.real, b.real) | _differ(a.imag, b.imag)
    if jnp.issubdtype(a.dtype, jnp.floating):
        bits = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
        a, b = lax.bitcast_convert_type(a, bits), lax.bitcast_convert_type(b, bits)
    return a != b


# ---------------------------------------------------------------------- parts of numbers
@view_lowering(aten.view.dtype)
def view_dtype(x, dtype):
    """The same bytes as numbers of another dtype; the last dimension absorbs a change of size."""
    return _bitcast(x, to_jax(dtype))


@view_dtype.inverse
def _(base, value, dtype):
    return _bitcast(value, np.dtype(base.dtype)).reshape(base.shape)


def _bitcast(x, target):
    source = np.dtype(x.dtype)
    if source == target:
        return x
    if source == np.bool_:
        return _bitcast(x.astype(np.uint8), target)
    if target == np.bool_:
        return _bitcast(x, np.dtype(np.uint8)).astype(bool)
    if source.kind == "c":  # XLA bitcasts no complex numbers
        return _bitcast(_pairs(x), target)
    if target.kind == "c":
        return _unpaired(_bitcast(x, np.dtype(f"f{target.itemsize // 2}")))
    if source.itemsize == target.itemsize:
        return lax.bitcast_convert_type(x, target)
    if source.itemsize > target.itemsize:
        wide = lax.bitcast_convert_type(x, target)
        return wide.reshape(*x.shape[:-1], -1) if x.ndim else wide
    n = target.itemsize // source.itemsize
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // n, n), target)


def _pairs(x):
    """Real and imaginary parts, interleaved along the last dimension."""
    both = jnp.stack([jnp.real(x), jnp.imag(x)], -1)
    return both.reshape(*x.shape[:-1], -1) if x.ndim else both


def _unpaired(x):
    both = x.reshape(*x.shape[:-1], -1, 2)
    return lax.complex(both[..., 0], both[..., 1])


@view_lowering(aten.view_as_real.default)
def view_as_real(x):
    """Real and imaginary parts as a last dimension."""
    return jnp.stack([jnp.real(x), jnp.imag(x)], -1)


@view_as_real.inverse
def _(base, value):
    return lax.complex(value[..., 0], value[..., 1])


@view_lowering(aten.view_as_complex.default)
def view_as_complex(x):
    """The last dimension's two numbers as one complex number."""
    return lax.complex(x[..., 0], x[..., 1])


@view_as_complex.inverse
def _(base, value):
    return jnp.stack([jnp.real(value), jnp.imag(value)], -1)


@view_lowering(aten._conj.default)
def conj(x):
    """Complex conjugates."""
    return jnp.conj(x)


@conj.inverse
def _(base, value):
    return jnp.conj(value)


@view_lowering(aten._neg_view.default)
def neg_view(x):
    """Negated numbers."""
    return -x


@neg_view.inverse
def _(base, value):
    return -value
