"""Losses and their backwards."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering, raise_if

from ._common import MEAN, SUM, reduce_loss, spread_loss, wide
from ._index import check_range


def _log_likelihood(x, target, weight, ignore_index):
    """Class axis, which targets count, and the weight of each (None for 1), for x [C], [N, C] or [N, C, ...]."""
    counts = target != ignore_index
    if weight is not None:
        w = jnp.where(counts, wide(weight).at[jnp.where(counts, target, 0)].get(mode="clip"), 0)
    else:
        w = counts.astype(wide(x).dtype)
    return min(1, x.ndim - 1), counts, w


def _gathered(x, index, axis):
    return jnp.take_along_axis(x, index, axis, mode="clip").squeeze(axis)


def _summed(x, index, axis):
    hit = lax.broadcasted_iota(np.int32, x.shape, axis) == index.astype(np.int32)
    return jnp.sum(jnp.where(hit, x, 0), axis)


def _nll(x, target, weight, reduction, ignore_index, pick=_gathered):
    if x.ndim == 1:
        target = target.reshape(())
    axis, counts, w = _log_likelihood(x, target, weight, ignore_index)
    check_range(jnp.where(counts, target, 0), x.shape[axis], message="Target {} is out of bounds.")
    index = jnp.expand_dims(jnp.where(counts, target, 0), axis)
    picked = pick(wide(x), index, axis)
    loss = jnp.where(counts, -picked * w, 0)
    if reduction not in (MEAN, SUM):
        return loss, jnp.zeros((), loss.dtype)
    total, weights = jnp.sum(loss), jnp.sum(w)
    return total / weights if reduction == MEAN else total, weights


@lowering(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default, checks=True)
def nll_loss(x, target, weight, reduction, ignore_index):
    """-weight[target] x[target], reduced, and the sum of the weights."""
    return _nll(x, target, weight, reduction, ignore_index)


@lowering(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default, checks=True, platforms=("tpu",), priority=1)
def nll_loss_on_tpu(x, target, weight, reduction, ignore_index):
    """The same by a masked sum, into which XLA fuses what makes x: for a gather it writes all logarithms, in float32."""
    return _nll(x, target, weight, reduction, ignore_index, _summed)


@lowering(aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
def nll_loss_backward(grad, x, target, weight, reduction, ignore_index, total_weight):
    """-weight[target] grad at the target, 0 elsewhere."""
    if x.ndim == 1:
        target = target.reshape(())
    axis, counts, w = _log_likelihood(x, target, weight, ignore_index)
    grad = wide(grad)
    if reduction == MEAN:
        grad = grad / wide(total_weight)
    if x.ndim == 1:
        grad = grad.reshape(())
    at_target = jnp.expand_dims(jnp.where(counts, -w * grad, 0), axis)
    classes = lax.broadcasted_iota(np.int32, x.shape, axis)
    hit = classes == jnp.expand_dims(jnp.where(counts, target, -1).astype(np.int32), axis)
    return jnp.where(hit, at_target, 0)


@lowering(aten.mse_loss.default, promote="default")
def mse_loss(x, target, reduction=MEAN):
    """(x - target)**2."""
    difference = x - target
    return reduce_loss(difference * difference, reduction)


@lowering(aten.mse_loss_backward.default, promote="default")
def mse_loss_backward(grad, x, target, reduction):
    """2 grad (x - target)."""
    return spread_loss(2 * (x - target) * grad, x.size, reduction)


@lowering(aten.smooth_l1_loss.default, promote="default")
def smooth_l1_loss(x, target, reduction=MEAN, beta=1.0):
    """z**2 / (2 beta) below beta, z - beta / 2 above, for z = |x - target|."""
    z = jnp.abs(x - target)
    return reduce_loss(jnp.where(z < beta, 0.5 * z * z / beta, z - 0.5 * beta) if beta else z, reduction)


@lowering(aten.smooth_l1_loss_backward.default, promote="default")
def smooth_l1_loss_backward(grad, x, target, reduction, beta):
    """grad times the difference / beta, clipped to [-1, 1]."""
    z = x - target
    slope = jnp.where(z <= -beta, -1, jnp.where(z >= beta, 1, z / beta)) if beta else jnp.sign(z)
    return spread_loss(slope * grad, x.size, reduction)


@lowering(aten.huber_loss.default, promote="default")
def huber_loss(x, target, reduction=MEAN, delta=1.0):
    """z**2 / 2 up to delta, delta (z - delta / 2) above, for z = |x - target|."""
    z = jnp.abs(x - target)
    return reduce_loss(jnp.where(z <= delta, 0.5 * z * z, delta * (z - 0.5 * delta)), reduction)


@lowering(aten.huber_loss_backward.default, promote="default")
def huber_loss_backward(grad, x, target, reduction, delta):
    """grad times the difference, clipped to [-delta, delta]."""
    return spread_loss(jnp.clip(x - target, -delta, delta) * grad, x.size, reduction)


@lowering(aten.binary_cross_entropy.default, promote="default", checks=True)
def binary_cross_entropy(x, target, weight=None, reduction=MEAN):
    """-(target log(x) + (1 - target) log(1 - x)), logarithms bounded by -100."""
    raise_if(~((x >= 0) & (x <= 1)), RuntimeError, "all elements of input should be between 0 and 1")
    loss = (target - 1) * jnp.maximum(jnp.log1p(-x), -100) - target * jnp.maximum(jnp.log(x), -100)
    return reduce_loss(loss if weight is None else loss * weight, reduction)


@lowering(aten.binary_cross_entropy_backward.default, promote="default")
def binary_cross_entropy_backward(grad, x, target, weight=None, reduction=MEAN):
    """grad (x - target) / (x (1 - x)), the denominator bounded by 1e-12."""
    slope = grad * (x - target) / jnp.maximum((1 - x) * x, 1e-12)
    return spread_loss(slope if weight is None else slope * weight, x.size, reduction)


@lowering(aten.binary_cross_entropy_with_logits.default, promote="default")
def binary_cross_entropy_with_logits(x, target, weight=None, pos_weight=None, reduction=MEAN):
    """binary_cross_entropy of sigmoid(x), computed from log(sigmoid(x))."""
    log_sigmoid = jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x)))
    factor = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    loss = (1 - target) * x - factor * log_sigmoid
    return reduce_loss(loss if weight is None else loss * weight, reduction)


@lowering(aten.soft_margin_loss.default, promote="default")
def soft_margin_loss(x, target, reduction=MEAN):
    """log(1 + exp(-target x))."""
    return reduce_loss(jnp.log1p(jnp.exp(-target * x)), reduction)


@lowering(aten.soft_margin_loss_backward.default, promote="default")
def soft_margin_loss_backward(grad, x, target, reduction):
    """-target grad sigmoid(-target x)."""
    return spread_loss(-target * grad * lax.logistic(-target * x), x.size, reduction)
