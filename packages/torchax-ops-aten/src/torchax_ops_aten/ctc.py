"""Connectionist temporal classification (Graves et al., 2006): the loss and its gradient."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import aten, lowering

from ._common import wide


def _lengths(lengths):
    """Lengths, a list of ints or an array, as int32."""
    if isinstance(lengths, (list, tuple)):
        return jnp.stack([jnp.asarray(n).astype(np.int32) for n in lengths])
    return lengths.astype(np.int32)


def _padded(targets, lengths, size):
    """Targets [N, size] from targets that are padded, or concatenated."""
    if targets.ndim == 2:
        return jnp.pad(targets, ((0, 0), (0, max(0, size - targets.shape[1]))))[:, :size].astype(np.int32)
    start = jnp.cumsum(lengths) - lengths
    index = start[:, None] + jnp.arange(size, dtype=np.int32)[None]
    return targets.at[index].get(mode="clip").astype(np.int32)


def _extended(targets, blank):
    """Labels [N, 2 S + 1] with blanks between them, and whether a path may skip the blank before a label."""
    labels = jnp.full((targets.shape[0], 2 * targets.shape[1] + 1), blank, np.int32).at[:, 1::2].set(targets)
    skip = jnp.zeros(labels.shape, np.bool_)
    return labels, skip.at[:, 3::2].set(targets[:, 1:] != targets[:, :-1])


def _log_sum_exp(*terms):
    top = terms[0]
    for t in terms[1:]:
        top = jnp.maximum(top, t)
    top = jnp.where(top == -jnp.inf, 0, top)
    return jnp.log(sum(jnp.exp(t - top) for t in terms)) + top


def _later(x, n):
    """x moved n places to the right, -inf coming in."""
    if x.shape[1] <= n:
        return jnp.full_like(x, -jnp.inf)
    return jnp.pad(x[:, :-n], ((0, 0), (n, 0)), constant_values=-jnp.inf)


def _at(x, index):
    """x[i, index[i]], -inf where the index is negative."""
    picked = jnp.take_along_axis(x, jnp.maximum(index, 0)[:, None], 1, mode="clip")[:, 0]
    return jnp.where(index < 0, -jnp.inf, picked)


def _emissions(log_probs, labels):
    """log_probs [T, N, C] at the labels [N, L]: [T, N, L]."""
    return jnp.take_along_axis(log_probs, jnp.broadcast_to(labels, (log_probs.shape[0], *labels.shape)), 2, mode="clip")


def _loss(log_probs, targets, input_lengths, target_lengths, blank, size):
    log_probs = wide(log_probs)
    input_lengths, target_lengths = _lengths(input_lengths), _lengths(target_lengths)
    labels, skip = _extended(_padded(targets, target_lengths, size), blank)
    emitted = _emissions(log_probs, labels)
    place = jnp.arange(labels.shape[1], dtype=np.int32)

    def step(alpha, emission):
        alpha = _log_sum_exp(alpha, _later(alpha, 1), jnp.where(skip, _later(alpha, 2), -jnp.inf)) + emission
        return alpha, alpha

    first = jnp.where((place < 2) & (place <= 2 * target_lengths[:, None]), emitted[0], -jnp.inf)
    _, rest = lax.scan(step, first, emitted[1:])
    alphas = jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, 1)
    last = jnp.take_along_axis(alphas, jnp.maximum(input_lengths - 1, 0)[:, None, None], 1, mode="clip")[:, 0]
    total = _log_sum_exp(_at(last, 2 * target_lengths), _at(last, 2 * target_lengths - 1))
    total = jnp.where(input_lengths == 0, jnp.where(target_lengths == 0, 0, -jnp.inf), total)
    return -total, alphas


@lowering(aten._ctc_loss.default, operands=("input_lengths",))
def ctc_loss(log_probs, targets, input_lengths, target_lengths, blank=0, zero_infinity=False):
    """-log p(targets), and the forward variables [N, T, 2 S + 1] for log_probs [T, N, C]."""
    return _loss(log_probs, targets, input_lengths, target_lengths, blank, max(target_lengths, default=0))


@lowering(aten._ctc_loss.Tensor)
def ctc_loss_tensor(log_probs, targets, input_lengths, target_lengths, blank=0, zero_infinity=False):
    """As above; lengths are values, so the forward variables are as large as the targets allow."""
    return _loss(log_probs, targets, input_lengths, target_lengths, blank, targets.shape[-1])


@lowering(aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor, operands=("input_lengths",))
def ctc_loss_backward(
    grad, log_probs, targets, input_lengths, target_lengths, neg_log_likelihood, log_alpha, blank, zero_infinity=False
):
    """exp(log_probs) less the probability that a class is emitted at that time."""
    y, nll = wide(log_probs), wide(neg_log_likelihood)
    size = (log_alpha.shape[2] - 1) // 2
    input_lengths, target_lengths = _lengths(input_lengths), _lengths(target_lengths)
    labels, skip = _extended(_padded(targets, target_lengths, size), blank)
    emitted = _emissions(y, labels)
    place = jnp.arange(labels.shape[1], dtype=np.int32)
    end = 2 * target_lengths[:, None]
    # the recursion of the forward variables, from the end of each sequence backwards
    skip_back = jnp.pad(skip[:, 2:], ((0, 0), (0, 2)))[:, : labels.shape[1]]
    valid = place <= end

    def step(beta, inputs):
        emission, time = inputs
        b = beta[:, ::-1]
        moved = [beta, _later(b, 1)[:, ::-1], jnp.where(skip_back, _later(b, 2)[:, ::-1], -jnp.inf)]
        going = _log_sum_exp(*moved) + emission
        final = jnp.where((place == end) | (place == end - 1), emission, -jnp.inf)
        beta = jnp.where(valid, jnp.where((time == input_lengths - 1)[:, None], final, going), -jnp.inf)
        return beta, beta

    times = jnp.arange(y.shape[0], dtype=np.int32)
    start = jnp.full(labels.shape, -jnp.inf, y.dtype)
    _, betas = lax.scan(step, start, (emitted, times), reverse=True)
    alphas = jnp.moveaxis(wide(log_alpha), 1, 0)
    path = alphas + betas - emitted
    occupancy = jnp.where(path == -jnp.inf, 0, jnp.exp(path + nll[:, None]))
    batch = jnp.arange(y.shape[1], dtype=np.int32)[None, :, None]
    emitting = jnp.zeros_like(y).at[times[:, None, None], batch, labels[None]].add(occupancy)
    result = (jnp.exp(y) - emitting) * wide(grad)[:, None]
    impossible = (nll == jnp.inf)[:, None]
    result = jnp.where(impossible, 0 if zero_infinity else jnp.nan, result)
    return jnp.where((times[:, None] < input_lengths)[:, :, None], result, 0)
