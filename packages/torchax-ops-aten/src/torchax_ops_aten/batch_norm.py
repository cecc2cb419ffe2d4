"""Batch normalization, its running statistics and gradients."""

import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering, stateful

from .norm import normalized_gradient, wide


def _per_channel(value, x):
    return value.reshape(1, -1, *[1] * (x.ndim - 2))


def _axes(x):
    return (0, *range(2, x.ndim))


def _apply(input, weight, bias, mean, rstd):
    x = wide(input)
    out = (x - _per_channel(mean, x)) * _per_channel(rstd, x)
    if weight is not None:
        out = out * _per_channel(wide(weight), x)
    if bias is not None:
        out = out + _per_channel(wide(bias), x)
    return out.astype(input.dtype)


def _train(input, weight, bias, running_mean, running_var, momentum, eps):
    """Result, batch mean, 1 / batch deviation, and the new running statistics."""
    x = wide(input)
    mean = x.mean(_axes(x))
    var = jnp.square(x - _per_channel(mean, x)).mean(_axes(x))
    rstd = lax.rsqrt(var + eps)
    count = x.size // x.shape[1] if x.shape[1] else 0
    if running_mean is not None:
        running_mean = ((1 - momentum) * wide(running_mean) + momentum * mean).astype(running_mean.dtype)
    if running_var is not None:
        # the running variance is the unbiased one; of a single value it is not a number, as in torch
        unbiased = var * (count / (count - 1)) if count > 1 else var * jnp.nan
        running_var = ((1 - momentum) * wide(running_var) + momentum * unbiased).astype(running_var.dtype)
    return _apply(input, weight, bias, mean, rstd), mean, rstd, running_mean, running_var


def _evaluate(input, weight, bias, running_mean, running_var, eps):
    """Result and the statistics that it was made with."""
    mean, rstd = wide(running_mean), lax.rsqrt(wide(running_var) + eps)
    return _apply(input, weight, bias, mean, rstd), mean, rstd


def _saved(results, input, weight, bias, running_mean, running_var, training, momentum, eps):
    """CPU torch saves no statistics but in training; its meta kernel says it does."""
    out, mean, rstd, *more = results
    return results if training else (out, mean.new_empty(0), rstd.new_empty(0), *more)


@stateful(aten.native_batch_norm.default, writes=("running_mean", "running_var"), meta=_saved)
def native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps):
    """Normalize each channel with its batch's statistics (training) or with the running ones."""
    if training:
        return _train(input, weight, bias, running_mean, running_var, momentum, eps)
    out, mean, rstd = _evaluate(input, weight, bias, running_mean, running_var, eps)
    return out, mean[:0], rstd[:0], running_mean, running_var


@stateful(aten._native_batch_norm_legit.default, meta=_saved)
def native_batch_norm_legit(input, weight, bias, running_mean, running_var, training, momentum, eps):
    """`native_batch_norm` with a schema that says what it writes."""
    return native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


@lowering(aten._native_batch_norm_legit.no_stats)
def native_batch_norm_no_stats(input, weight, bias, training, momentum, eps):
    """`native_batch_norm` by the batch's statistics alone."""
    return _train(input, weight, bias, None, None, momentum, eps)[:3]


@lowering(aten._native_batch_norm_legit_functional.default, meta=_saved)
def native_batch_norm_functional(input, weight, bias, running_mean, running_var, training, momentum, eps):
    """`native_batch_norm`, the new running statistics among the results."""
    return native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


@lowering(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm_no_training(input, weight, bias, running_mean, running_var, momentum, eps):
    """`native_batch_norm` by the running statistics."""
    return _evaluate(input, weight, bias, running_mean, running_var, eps)


@stateful(aten._batch_norm_with_update.default)
def batch_norm_with_update(input, weight, bias, running_mean, running_var, momentum, eps):
    """`native_batch_norm` in training; the third-last result is torch's scratch space, empty here."""
    out, mean, rstd, running_mean, running_var = _train(input, weight, bias, running_mean, running_var, momentum, eps)
    return out, mean, rstd, jnp.zeros((0,), jnp.uint8), running_mean, running_var


@lowering(aten._batch_norm_with_update_functional.default)
def batch_norm_with_update_functional(input, weight, bias, running_mean, running_var, momentum, eps):
    """`batch_norm_with_update`, the new running statistics among the results."""
    return batch_norm_with_update(input, weight, bias, running_mean, running_var, momentum, eps)


@lowering(aten._batch_norm_no_update.default)
def batch_norm_no_update(input, weight, bias, running_mean, running_var, momentum, eps):
    """`native_batch_norm` by the running statistics, with torch's scratch space, empty here."""
    return *_evaluate(input, weight, bias, running_mean, running_var, eps), jnp.zeros((0,), jnp.uint8)


@lowering(aten.native_batch_norm_backward.default)
def native_batch_norm_backward(
    grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps, output_mask
):
    """Gradients of input, weight and bias."""
    grad, x = wide(grad_out), wide(input)
    mean = wide(save_mean if train else running_mean)
    rstd = wide(save_invstd) if train else lax.rsqrt(wide(running_var) + eps)
    mean, rstd = _per_channel(mean, x), _per_channel(rstd, x)
    y = (x - mean) * rstd
    axes = _axes(x)
    # torch's meta kernel has tensors also where none is asked for
    grad_input, grad_weight, grad_bias = (
        jnp.zeros_like(x),
        jnp.zeros(x.shape[1], x.dtype),
        jnp.zeros(x.shape[1], x.dtype),
    )
    if output_mask[0]:
        scaled = grad if weight is None else grad * _per_channel(wide(weight), x)
        grad_input = (normalized_gradient(scaled, y, rstd, axes) if train else scaled * rstd).astype(input.dtype)
    if output_mask[1]:
        grad_weight = (grad * y).sum(axes)
    if output_mask[2]:
        grad_bias = grad.sum(axes)
    return grad_input, grad_weight, grad_bias


@lowering(aten.batch_norm_backward.default)
def batch_norm_backward(
    grad_out, input, weight, running_mean, running_var, save_mean, save_var, update, eps, output_mask, reserve
):
    """Gradients of `batch_norm_with_update`."""
    return native_batch_norm_backward(
        grad_out, input, weight, running_mean, running_var, save_mean, save_var, update, eps, output_mask
    )
