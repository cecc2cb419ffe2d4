"""A compiled GPT against the same model written by hand in JAX: run time, and the time to trace and lower it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
import torchax

from .measure import Row, ratio
from .models import BATCH, GPT, HEADS, LAYERS, LENGTH, VOCABULARY

Weights = dict[str, jax.Array]


def _norm(w: Weights, name: str, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * w[name + ".weight"] + w[name + ".bias"]


def _linear(w: Weights, name: str, x: jax.Array) -> jax.Array:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def forward(w: Weights, tokens: jax.Array) -> jax.Array:
    """Logits (batch, length, vocabulary) for tokens (batch, length)."""
    (batch, length), width = tokens.shape, w["norm.weight"].shape[0]
    x = w["tokens.weight"][tokens] + w["positions.weight"][:length]
    mask = jnp.tril(jnp.ones((length, length), bool))
    for i in range(LAYERS):
        b = f"blocks.{i}."
        qkv = _linear(w, b + "qkv", _norm(w, b + "norm1", x)).reshape(batch, length, 3, HEADS, width // HEADS)
        q, k, v = jnp.transpose(qkv, (2, 0, 3, 1, 4))
        scores = jnp.where(mask, jnp.einsum("bhqd,bhkd->bhqk", q, k) * (width // HEADS) ** -0.5, -jnp.inf)
        seen = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, -1), v)
        x = x + _linear(w, b + "out", seen.swapaxes(1, 2).reshape(batch, length, width))
        h = jax.nn.gelu(_linear(w, b + "up", _norm(w, b + "norm2", x)), approximate=False)
        x = x + _linear(w, b + "down", h)
    return _norm(w, "norm", x) @ w["head.weight"].T


def loss(w: Weights, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the model's logits with the tokens themselves (a number to differentiate)."""
    logp = jax.nn.log_softmax(forward(w, tokens), -1)
    return -jnp.take_along_axis(logp, tokens[..., None], -1).mean()


def _traced(make: Callable[[], Any], *args: Any, rounds: int = 3) -> tuple[Any, float]:
    """The compiled program of a jitted function, and the seconds to trace and lower it (the fastest of several)."""
    seconds, lowered = [], None
    for _ in range(rounds):
        function = make()  # a new one, that no cache knows
        start = time.perf_counter()
        lowered = function.lower(*args)
        seconds.append(time.perf_counter() - start)
    assert lowered is not None
    return lowered.compile(), min(seconds)


def gpt() -> Iterator[Row]:
    """Forward, and loss with gradients: run time and tracing; and `torchax.compile` as a user calls it."""
    torch.manual_seed(0)
    model = GPT().eval()
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    weights = {k: jnp.asarray(v.detach().numpy()) for k, v in model.named_parameters()}
    # int32 on both sides, as JAX users have it
    indices = jnp.asarray(tokens.numpy(), jnp.int32)
    from torchax.interop import jax_view

    jmodel = GPT().eval()
    jmodel.load_state_dict(model.state_dict())
    jmodel = jmodel.to("jax")
    ours = {k: cast("Any", v.detach()).jax() for k, v in jmodel.named_parameters()}
    our_forward = jax_view(lambda p, i: torch.func.functional_call(jmodel, p, (i,)))
    our_loss = jax_view(
        lambda p, i: F.cross_entropy(torch.func.functional_call(jmodel, p, (i,)).flatten(0, 1), i.flatten().long())
    )
    kinds = [
        ("forward", lambda: jax.jit(lambda p, i: our_forward(p, i)), lambda: jax.jit(lambda p, i: forward(p, i))),
        (
            "loss and gradients",
            lambda: jax.jit(jax.value_and_grad(lambda p, i: our_loss(p, i))),
            lambda: jax.jit(jax.value_and_grad(lambda p, i: loss(p, i))),
        ),
    ]
    for name, mine, theirs in kinds:
        a, trace_a = _traced(mine, ours, indices)
        b, trace_b = _traced(theirs, weights, indices)
        yield ratio(
            "gpt",
            f"{name}, run",
            lambda a=a: a(ours, indices),
            lambda b=b: b(weights, indices),
            "hand-written JAX",
            1.05,
        )
        yield Row("gpt", f"{name}, tracing", trace_a / trace_b, "x", "hand-written JAX", 2.0, trace_a, trace_b)
    compiled = torchax.compile(jmodel)
    on_device = tokens.to("jax")
    by_hand = jax.jit(forward)
    with torch.no_grad():
        yield ratio(
            "gpt",
            "torchax.compile(model)(tokens)",
            lambda: compiled(on_device),
            lambda: by_hand(weights, indices),
            "hand-written JAX",
            1.05,
            lambda: model(tokens),
        )
