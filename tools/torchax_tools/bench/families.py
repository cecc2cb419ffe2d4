"""Compiled ops at realistic sizes, one or two of each family, against the idiomatic JAX for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torchax.interop import jax_view

from .measure import Row, failed, ratio

GOAL = 1.1


def _window(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def _convolution(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME")


def _layer_norm(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * w + b


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), v)


def _cross_entropy(x: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1).mean()


def _floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _indices(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n, shape, np.int32)


def _cases() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], list[np.ndarray]]]:
    """Family, op in PyTorch, the same in JAX, arguments."""
    big, square, images = _floats(1024, 1024), _floats(256, 256), _floats(8, 32, 56, 56)
    rows = _indices(1024, 4096)
    definite = square @ square.T + 256 * np.eye(256, dtype=np.float32)
    yield "pointwise: gelu", F.gelu, lambda x: jax.nn.gelu(x, approximate=False), [big]
    yield "reductions: sum", lambda x: x.sum(-1), lambda x: x.sum(-1), [big]
    yield "reductions: var", lambda x: x.var(-1), lambda x: x.var(-1, ddof=1), [big]
    yield "scans: cumsum", lambda x: x.cumsum(0), lambda x: jnp.cumsum(x, 0), [big]
    yield "shape: cat", lambda x, y: torch.cat([x, y], 1), lambda x, y: jnp.concatenate([x, y], 1), [big, big]
    yield "views: write a slice", _slice_torch, lambda x: x.at[:, 10:500].add(1), [big]
    yield "indexing: rows by index", lambda x, i: x[i], lambda x, i: x[i], [big, rows]
    yield (
        "indexing: index_add",
        lambda x, i, y: x.index_add(0, i, y),
        lambda x, i, y: x.at[i].add(y),
        [
            big,
            rows,
            _floats(4096, 1024),
        ],
    )
    yield (
        "scatter: gather",
        lambda x, i: x.gather(1, i),
        lambda x, i: jnp.take_along_axis(x, i, 1),
        [
            big,
            _indices(1024, 1024, 64),
        ],
    )
    yield "embedding", lambda w, i: F.embedding(i, w), lambda w, i: w[i], [_floats(8192, 256), _indices(8192, 32, 128)]
    yield "matmul", torch.matmul, jnp.matmul, [square, square]
    yield "matmul: linear", F.linear, lambda x, w, b: x @ w.T + b, [big, _floats(512, 1024), _floats(512)]
    yield "conv: 3x3", lambda x, w: F.conv2d(x, w, padding=1), _convolution, [images, _floats(32, 32, 3, 3)]
    yield "pool: max 2x2", lambda x: F.max_pool2d(x, 2), _window, [images]
    yield "norm: layer_norm", lambda x, w, b: F.layer_norm(x, (1024,), w, b), _layer_norm, [big, big[0], big[1]]
    yield "norm: softmax", lambda x: x.softmax(-1), jax.nn.softmax, [big]
    yield "attention", F.scaled_dot_product_attention, _attention, [_floats(2, 8, 256, 64)] * 3
    yield "loss: cross_entropy", F.cross_entropy, _cross_entropy, [big, _indices(1024, 1024)]
    yield "sort", lambda x: x.sort(-1).values, lambda x: jnp.sort(x, -1), [square]
    yield "sort: topk", lambda x: x.topk(8).values, lambda x: jax.lax.top_k(x, 8)[0], [big]
    yield "linalg: cholesky", torch.linalg.cholesky, jnp.linalg.cholesky, [definite]
    yield "linalg: solve", torch.linalg.solve, jnp.linalg.solve, [definite, square]
    yield "fft", lambda x: torch.fft.rfft(x).abs(), lambda x: jnp.abs(jnp.fft.rfft(x)), [big]
    yield (
        "pad: reflect",
        lambda x: F.pad(x, (3, 3), "reflect"),
        lambda x: jnp.pad(x, ((0, 0), (3, 3)), "reflect"),
        [big],
    )
    yield "special: lgamma", torch.lgamma, jax.lax.lgamma, [np.abs(big) + 0.1]
    yield "upsample: nearest", lambda x: F.interpolate(x, scale_factor=2), _twice, [images]


def _slice_torch(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 10:500] += 1
    return x


def _twice(x: jax.Array) -> jax.Array:
    return jnp.repeat(jnp.repeat(x, 2, 2), 2, 3)


def families() -> Iterator[Row]:
    """Each op under `jax.jit`, the PyTorch one through `jax_view`."""
    for name, ours, theirs, values in _cases():
        arrays = [jnp.asarray(v) for v in values]
        try:
            compiled = jax.jit(jax_view(ours)).lower(*arrays).compile()
            other = jax.jit(theirs).lower(*arrays).compile()
        except Exception as error:
            yield failed("families", name, error)
            continue
        run = lambda f=compiled, a=arrays: jax.block_until_ready(f(*a))
        run_other = lambda f=other, a=arrays: jax.block_until_ready(f(*a))
        yield ratio("families", name, run, run_other, "jax.jit", GOAL, batch=0.05, rounds=9)
