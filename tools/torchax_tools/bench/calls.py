"""What a call of a compiled step costs beside the work: above `jax.jit` of a function that takes and gives the same arrays."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import torch
import torchax

from .measure import Row, failed, times

COUNT = 200


def calls() -> Iterator[Row]:
    """Microseconds of a call that scales 200 captured tensors of 4 elements, less those of `jax.jit` with donation."""
    name = f"{COUNT} captured tensors: a call, above JAX's"
    try:
        tensors = [torch.ones(4, device="jax") for _ in range(COUNT)]
        held = [jnp.ones(4) for _ in range(COUNT)]
        x, factor = torch.ones((), device="jax"), jnp.ones(())

        @torchax.compile
        def step(x: torch.Tensor) -> torch.Tensor:
            for t in tensors:
                t.mul_(x)
            return x + 1

        scale = jax.jit(lambda held, x: ([a * x for a in held], x + 1), donate_argnums=0)

        def by_hand() -> jax.Array:
            held[:], result = scale(held, factor)
            return result

        ours, theirs = times(lambda: step(x), by_hand, rounds=40)
        yield Row("calls", name, (ours - theirs) * 1e6, "us", "jax.jit", 60, ours, theirs)
    except Exception as error:
        yield failed("calls", name, error)
