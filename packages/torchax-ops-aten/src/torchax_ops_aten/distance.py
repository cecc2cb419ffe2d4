"""Distances between the rows of matrices."""

import jax.numpy as jnp
import numpy as np
from torchax.ops import aten, lowering

from ._common import wide


def _norm(difference, p):
    """The p-norm over the last axis."""
    size = jnp.abs(difference)
    if p == 0:
        return jnp.sum((size != 0).astype(size.dtype), axis=-1)
    if p == 1:
        return jnp.sum(size, axis=-1)
    if p == 2:
        return jnp.sqrt(jnp.sum(size * size, axis=-1))
    if p == float("inf"):
        return jnp.max(size, axis=-1, initial=0)
    return jnp.sum(size**p, axis=-1) ** (1 / p)


def _slope(difference, distance, p):
    """The derivative of the p-norm by each difference; 0 where the distance is 0."""
    size, distance = jnp.abs(difference), distance[..., None]
    if p == 0:
        return jnp.zeros_like(difference)
    if p == 1:
        return jnp.sign(difference)
    if p == float("inf"):
        return jnp.sign(difference) * (size == distance)
    nowhere = (distance == 0) | (size == 0)
    ratio = jnp.where(nowhere, 1, size) / jnp.where(distance == 0, 1, distance)
    return jnp.where(nowhere, 0, jnp.sign(difference) * ratio ** (p - 1))


def _differences(x1, x2):
    return wide(x1)[..., :, None, :] - wide(x2)[..., None, :, :]


@lowering(aten._cdist_forward.default)
def cdist(x1, x2, p, compute_mode=None):
    """The p-norm distances of the rows of x1 [..., P, M] and x2 [..., R, M]: [..., P, R]."""
    return _norm(_differences(x1, x2), p)


@lowering(aten._cdist_backward.default)
def cdist_backward(grad, x1, x2, p, distance):
    """The gradient of cdist for x1 (its batch axes broadcast with those of x2)."""
    if grad.size == 0:
        return jnp.zeros_like(x1)
    return jnp.sum(wide(grad)[..., None] * _slope(_differences(x1, x2), wide(distance), p), axis=-2)


def _pairs(n):
    return np.triu_indices(n, 1)


@lowering(aten._pdist_forward.default)
def pdist(x, p=2.0):
    """The p-norm distances of all pairs of rows, i < j."""
    i, j = _pairs(x.shape[0])
    return _norm(wide(x)[i] - wide(x)[j], p)


@lowering(aten._pdist_backward.default)
def pdist_backward(grad, x, p, distance):
    """The gradient of pdist."""
    i, j = _pairs(x.shape[0])
    y = wide(x)
    slope = wide(grad)[:, None] * _slope(y[i] - y[j], wide(distance), p)
    return jnp.zeros_like(y).at[i].add(slope).at[j].add(-slope)
