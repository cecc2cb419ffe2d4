"""Fused optimizer steps and the gradient scaler's ops, over lists of tensors."""

import math

import jax.numpy as jnp
from torchax.ops import aten, lowering

from ._index import opmath, scalar

ADAM = ("lr", "beta1", "beta2", "eps")


def _unscaled(grad, grad_scale, maximize):
    """``(old, new)`` of the gradient, divided by the loss scale, and what the update takes of it."""
    new = grad
    if grad_scale is not None:
        new = (grad.astype(jnp.float32) / grad_scale).astype(grad.dtype)
    return (grad, new), -new if maximize else new


def _step(rows, found_inf, width):
    """`width` columns of ``(old, new)`` rows; all old where an infinity was found in the gradients."""
    columns = []
    for column in zip(*rows, strict=True) if rows else [()] * width:
        news = [new.astype(old.dtype) for old, new in column]
        if found_inf is not None:
            skip = found_inf.reshape(()) != 0
            news = [jnp.where(skip, old, new) for (old, _), new in zip(column, news, strict=True)]
        columns.append(news)
    return columns


def _bias_correction(beta, step):
    """``1 - beta**step`` without the cancellation that it has in float32."""
    log = (math.log(beta) if beta > 0 else -math.inf) if isinstance(beta, (int, float)) else jnp.log(beta)
    return -jnp.expm1(step * log)


def _adam(decoupled):
    def adam(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
        *, lr, beta1, beta2, weight_decay, eps, amsgrad, maximize, grad_scale=None, found_inf=None,
    ):  # fmt: skip
        """One step of Adam, Kingma and Ba (2014); AdamW decays weights apart from the gradient."""
        rows = []
        for i, (p, g, m, v, t) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, state_steps, strict=True)):
            work = opmath(p.dtype)
            g, update = _unscaled(g, grad_scale, maximize)
            new, update = p.astype(work), update.astype(work)
            rate = jnp.asarray(lr).astype(work)
            if weight_decay != 0:
                if decoupled:
                    new = new - rate * weight_decay * new
                else:
                    update = update + new * weight_decay
            first = m + scalar(1 - beta1, work) * (update - m.astype(work))
            second = scalar(beta2, work) * v.astype(work) + scalar(1 - beta2, work) * update * update
            largest = jnp.maximum(max_exp_avg_sqs[i].astype(work), second) if amsgrad else second
            correction1, correction2 = (_bias_correction(b, t).astype(work) for b in (beta1, beta2))
            size = jnp.sqrt(largest) / jnp.sqrt(correction2) + scalar(eps, work)
            new = new - rate / correction1 * first / size
            rows.append([(p, new), g, (m, first), (v, second)] + ([(max_exp_avg_sqs[i], largest)] if amsgrad else []))
        columns = _step(rows, found_inf, 5 if amsgrad else 4)
        return *columns[:4], columns[4] if amsgrad else list(max_exp_avg_sqs)

    return adam


fused_adam = lowering(aten._fused_adam.default, operands=ADAM)(_adam(False))
fused_adam_tensor_lr = lowering(aten._fused_adam.tensor_lr, operands=ADAM[1:])(_adam(False))
fused_adamw = lowering(aten._fused_adamw.default, operands=ADAM)(_adam(True))
fused_adamw_tensor_lr = lowering(aten._fused_adamw.tensor_lr, operands=ADAM[1:])(_adam(True))


def _sgd(
    params, grads, momentum_buffer_list,
    *, weight_decay, momentum, lr, dampening, nesterov, maximize, is_first_step, grad_scale=None, found_inf=None,
):  # fmt: skip
    """One step of SGD with momentum."""
    rows = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        work = opmath(p.dtype)
        g, update = _unscaled(g, grad_scale, maximize)
        new, update = p.astype(work), update.astype(work)
        if weight_decay != 0:
            update = update + weight_decay * new
        row = []
        if momentum != 0:
            old = momentum_buffer_list[i]
            buffer = update if is_first_step else momentum * old.astype(work) + (1 - dampening) * update
            row.append((old, buffer))
            update = update + momentum * buffer if nesterov else buffer
        rows.append([(p, new - jnp.asarray(lr).astype(work) * update), g, *row])
    params, grads, *buffers = _step(rows, found_inf, 2)
    return params, grads, buffers[0] if buffers else list(momentum_buffer_list)


def _own(fn):
    """A function of its own, since lowerings are recorded on the function."""

    def kernel(*args, **kwargs):
        return fn(*args, **kwargs)

    kernel.__doc__ = fn.__doc__
    return kernel


fused_sgd = lowering(aten._fused_sgd.default, operands=("lr",))(_own(_sgd))
fused_sgd_tensor_lr = lowering(aten._fused_sgd.tensor_lr)(_own(_sgd))


def _adagrad(
    params, grads, state_sums, state_steps,
    *, lr, lr_decay, weight_decay, eps, maximize, grad_scale=None, found_inf=None,
):  # fmt: skip
    """One step of Adagrad, Duchi et al. (2011)."""
    rows = []
    for p, g, total, t in zip(params, grads, state_sums, state_steps, strict=True):
        work = opmath(p.dtype)
        g, update = _unscaled(g, grad_scale, maximize)
        new, update = p.astype(work), update.astype(work)
        if weight_decay != 0:
            update = update + weight_decay * new
        rate = jnp.asarray(lr).astype(work) / (1 + (t.astype(work) - 1) * lr_decay)
        added = total.astype(work) + update * update
        rows.append([(p, new - rate * update / (jnp.sqrt(added) + eps)), g, (total, added)])
    return tuple(_step(rows, found_inf, 3))


@lowering(aten._fused_adagrad.default, operands=("lr",))
def fused_adagrad(params, grads, state_sums, state_steps, **options):
    """One step of Adagrad."""
    return *_adagrad(params, grads, state_sums, state_steps, **options), list(state_steps)


fused_adagrad_tensor_lr = lowering(aten._fused_adagrad.tensor_lr)(_own(_adagrad))


@lowering(aten._amp_foreach_non_finite_check_and_unscale.default)
def amp_foreach_non_finite_check_and_unscale(grads, found_inf, inv_scale):
    """Gradients times `inv_scale`, and whether any of them is not finite (1.0, else what `found_inf` was)."""
    bad = [jnp.any(~jnp.isfinite(g)) for g in grads]
    scaled = [(g.astype(opmath(g.dtype)) * inv_scale).astype(g.dtype) for g in grads]
    found = jnp.any(jnp.stack(bad)) if bad else jnp.zeros((), bool)
    return scaled, jnp.where(found, jnp.ones_like(found_inf), found_inf)


@lowering(aten._amp_update_scale.default)
def amp_update_scale(scale, growth_tracker, found_inf, growth_factor, backoff_factor, growth_interval):
    """The next loss scale and the number of good steps since it changed."""
    bad = found_inf != 0
    good = growth_tracker + 1
    grown = scale * growth_factor
    grow = (good == growth_interval) & jnp.isfinite(grown)
    next_scale = jnp.where(bad, scale * backoff_factor, jnp.where(grow, grown, scale))
    return next_scale, jnp.where(bad | (good == growth_interval), 0, good).astype(growth_tracker.dtype)
