"""Draws from distributions with parameters per element, and the gradients of reparametrized ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from torchax.ops import aten, lowering, raise_if, stateful

from ._index import is_half, opmath


@stateful(aten.multinomial.default, random=True, checks=True)
def multinomial(x, num_samples, replacement=False, *, key):
    """Categories drawn with the weights in the rows of `x`; without replacement the order is that of the draws."""
    if num_samples <= 0:
        raise RuntimeError(f"cannot sample n_sample <= 0 samples; got {num_samples}")
    weights = x.astype(opmath(x.dtype))
    bad = ~((weights >= 0) & (weights < jnp.inf))
    raise_if(bad, RuntimeError, "probability tensor contains either `inf`, `nan` or element < 0")
    enough = 1 if replacement else num_samples
    message = f"invalid multinomial distribution: fewer than {enough} categories with a positive weight"
    raise_if(jnp.sum(weights > 0, -1) < enough, RuntimeError, message)
    shape = (*x.shape[:-1], num_samples)
    if num_samples == 1 or not replacement:  # Gumbel top-k
        noisy = jnp.log(weights) + random.gumbel(key, weights.shape, weights.dtype)
        if num_samples == 1:
            return jnp.argmax(noisy, -1, keepdims=True).astype(jnp.int32)
        return lax.top_k(noisy, num_samples)[1]
    ends = jnp.cumsum(weights, -1)
    draws = random.uniform(key, shape, weights.dtype) * ends[..., -1:]
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, -1), -1, keepdims=True)  # rounding may go past it
    find = jnp.vectorize(lambda a, v: jnp.searchsorted(a, v, side="right"), signature="(n),(m)->(m)")
    return jnp.minimum(find(ends, draws), last).astype(jnp.int32)


@stateful(aten.poisson.default, random=True, checks=True)
def poisson(x, *, key):
    """Poisson with rates `x`."""
    raise_if(x < 0, RuntimeError, "invalid Poisson rate, expected rate to be non-negative")
    return random.poisson(key, x.astype(opmath(x.dtype)), x.shape).astype(x.dtype)


@stateful(aten.binomial.default, random=True)
def binomial(count, prob, *, key):
    """Successes in `count` trials."""
    work = opmath(prob.dtype)
    shape = np.broadcast_shapes(count.shape, prob.shape)
    return random.binomial(key, count.astype(work), prob.astype(work), shape, work).astype(count.dtype)


@stateful(aten._standard_gamma.default, random=True)
def standard_gamma(x, *, key):
    """Gamma with concentration `x` and rate 1; never 0."""
    work = opmath(x.dtype)
    draws = random.gamma(key, x.astype(work), x.shape, work)
    return jnp.maximum(draws, jnp.finfo(x.dtype).tiny).astype(x.dtype)


@lowering(aten._standard_gamma_grad.default)
def standard_gamma_grad(x, output):
    """Gradient of a gamma draw `output` for its concentration `x`."""
    work = opmath(x.dtype)
    # jax passes dtype itself
    gradient = lax.random_gamma_grad(x.astype(work), output.astype(work))  # pyright: ignore[reportCallIssue]
    return gradient.astype(x.dtype)


@stateful(aten._sample_dirichlet.default, random=True)
def sample_dirichlet(x, *, key):
    """Dirichlet with concentrations in the last dimension."""
    work = opmath(x.dtype)
    logs = random.loggamma(key, x.astype(work), x.shape, work)
    return jnp.maximum(jax.nn.softmax(logs, -1), jnp.finfo(x.dtype).tiny).astype(x.dtype)


@lowering(aten._dirichlet_grad.default)
def dirichlet_grad(x, alpha, total):
    """Gradient of a Dirichlet draw's marginal `x` for its concentration.

    The marginal is Beta(alpha, total - alpha); by implicit reparametrization (Figurnov et al., 2018) the gradient is
    ``-(dF/dalpha) / (pdf (1 - x))``. The cdf's derivative is taken by central differences in float64.
    """
    with jax.enable_x64(True):
        wide = [v.astype(np.float64) for v in (x, alpha, total)]
        value, a, b = jnp.clip(wide[0], 1e-12, 1 - 1e-12), wide[1], wide[2] - wide[1]
        h = 1e-5 * jnp.maximum(a, 1e-3)
        slope = (jax.scipy.special.betainc(a + h, b, value) - jax.scipy.special.betainc(a - h, b, value)) / (2 * h)
        log_pdf = (a - 1) * jnp.log(value) + (b - 1) * jnp.log1p(-value) - jax.scipy.special.betaln(a, b)
        grad = -slope / (jnp.exp(log_pdf) * (1 - value))
        return grad.astype(np.float32 if is_half(x.dtype) else x.dtype)
