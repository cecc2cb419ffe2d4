"""Multi-class and multi-label margin losses."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering, raise_if

from ._common import MEAN, SUM, wide
from ._index import check_range


def _rows(x):
    return x.reshape(1, -1) if x.ndim < 2 else x


def _reduced(loss, reduction, shape):
    if reduction == MEAN:
        return jnp.mean(loss)
    return jnp.sum(loss) if reduction == SUM else loss.reshape(shape)


def _multi(x, target, margin, weight):
    """Rows, where the target is, the margins (0 at the target), the factor of each row."""
    x = _rows(wide(x))
    check_range(target, x.shape[1], error=RuntimeError, message="target out of range")
    target = target.reshape(-1).astype(np.int32)
    hit = lax.broadcasted_iota(np.int32, x.shape, 1) == target[:, None]
    own = jnp.sum(jnp.where(hit, x, 0), axis=1, keepdims=True)
    z = jnp.where(hit, 0, jnp.maximum(jnp.asarray(margin, x.dtype) - own + x, 0))
    factor = jnp.asarray(1 / x.shape[1], x.dtype)
    if weight is not None:
        factor = factor * wide(weight).at[target].get(mode="clip")[:, None]
    return hit, z, factor


@lowering(aten.multi_margin_loss.default, static=("p",), checks=True)
def multi_margin_loss(x, target, p=1, margin=1, weight=None, reduction=MEAN):
    """The mean of max(0, margin - x[target] + x[j])**p over the other classes j."""
    _, z, factor = _multi(x, target, margin, weight)
    return _reduced(jnp.sum((z if p == 1 else z * z) * factor, axis=1), reduction, target.shape)


@lowering(aten.multi_margin_loss_backward.default, static=("p",))
def multi_margin_loss_backward(grad, x, target, p, margin, weight=None, reduction=MEAN):
    """The gradient of multi_margin_loss."""
    hit, z, factor = _multi(x, target, margin, weight)
    slope = factor * ((z > 0).astype(z.dtype) if p == 1 else 2 * z)
    slope = jnp.where(hit, -jnp.sum(slope, axis=1, keepdims=True), slope)
    if reduction == MEAN:
        slope = slope / z.shape[0]
    return (slope * wide(grad).reshape(-1, 1)).reshape(x.shape)


def _multilabel(x, target):
    """Rows, the targets before the first -1, which classes are targets, the hits [N, target, class], the margins."""
    x = _rows(wide(x))
    message = f"argument #2 'target' is out of range: {{}} is not in [-1, {x.shape[1]})"
    raise_if((target < -1) | (target >= x.shape[1]), RuntimeError, message, target)
    target = _rows(target).astype(np.int32)
    valid = jnp.cumsum((target < 0).astype(np.int32), axis=1) == 0
    classes = lax.broadcasted_iota(np.int32, (1, 1, x.shape[1]), 2)
    hits = (target[:, :, None] == classes) & valid[:, :, None]
    is_target = jnp.any(hits, axis=1)
    own = jnp.sum(jnp.where(hits, x[:, None, :], 0), axis=2)
    z = jnp.where(valid[:, :, None] & ~is_target[:, None, :], jnp.maximum(1 - own[:, :, None] + x[:, None, :], 0), 0)
    return x, is_target, hits, z


@lowering(aten.multilabel_margin_loss_forward.default, checks=True)
def multilabel_margin_loss(x, target, reduction):
    """The sum of max(0, 1 - x[t] + x[j]) over targets t and other classes j, and which classes are targets."""
    rows, is_target, _, z = _multilabel(x, target)
    loss = jnp.sum(z, axis=(1, 2)) / rows.shape[1]
    return _reduced(loss, reduction, x.shape[:-1]), is_target.astype(rows.dtype).reshape(target.shape)


@lowering(aten.multilabel_margin_loss_backward.default)
def multilabel_margin_loss_backward(grad, x, target, reduction, is_target):
    """The gradient of multilabel_margin_loss."""
    rows, _, hits, z = _multilabel(x, target)
    active = (z > 0).astype(rows.dtype) / rows.shape[1]
    pulled = jnp.sum(jnp.where(hits, jnp.sum(active, axis=2, keepdims=True), 0), axis=1)
    slope = jnp.sum(active, axis=1) - pulled
    if reduction == MEAN:
        slope = slope / rows.shape[0]
    return (slope * wide(grad).reshape(-1, 1)).reshape(x.shape)
