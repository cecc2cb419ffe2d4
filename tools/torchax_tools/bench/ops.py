"""Single operators on small tensors, against eager JAX; operators from several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F

from .measure import Row, failed, ratio, wait

SIZE = 16


def ops() -> Iterator[Row]:
    """Operators on 16x16 float32 tensors without gradients."""
    ca, cb, weight, bias = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE), torch.rand(SIZE), torch.rand(SIZE)
    a, b, w, v = (t.to("jax") for t in (ca, cb, weight, bias))
    ja, jb, jw, jv = (jnp.asarray(t.numpy()) for t in (ca, cb, weight, bias))

    def jax_layer_norm(x: jax.Array) -> jax.Array:
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * jw + jv

    table = [
        ("a + b", 2.5, lambda: a + b, lambda: ja + jb, lambda: ca + cb),
        ("a @ b", 2.5, lambda: a @ b, lambda: ja @ jb, lambda: ca @ cb),
        ("relu", 0.7, lambda: F.relu(a), lambda: jax.nn.relu(ja), lambda: F.relu(ca)),
        ("gelu", 0.7, lambda: F.gelu(a), lambda: jax.nn.gelu(ja, approximate=False), lambda: F.gelu(ca)),
        ("softmax", 0.7, lambda: torch.softmax(a, -1), lambda: jax.nn.softmax(ja, -1), lambda: torch.softmax(ca, -1)),
        (
            "layer_norm",
            0.7,
            lambda: F.layer_norm(a, (SIZE,), w, v),
            lambda: jax_layer_norm(ja),
            lambda: F.layer_norm(ca, (SIZE,), weight, bias),
        ),
        ("view", 0.5, lambda: a.view(-1), lambda: ja.reshape(-1), lambda: ca.view(-1)),
        ("t", 0.5, lambda: a.t(), lambda: ja.T, lambda: ca.t()),
        ("transpose", 0.5, lambda: a.transpose(0, 1), lambda: jnp.transpose(ja, (1, 0)), lambda: ca.transpose(0, 1)),
        ("x[2:10]", 0.5, lambda: a[2:10], lambda: ja[2:10], lambda: ca[2:10]),
    ]
    with torch.no_grad():
        for name, goal, ours, theirs, cpu in table:
            against = "eager jax.nn" if name in ("relu", "gelu", "softmax") else "eager jax.numpy"
            yield ratio("ops", name, ours, theirs, against, goal, cpu)
        target, ctarget = a.clone(), ca.clone()
        yield ratio("ops", "a.add_(b)", lambda: target.add_(b), lambda: a + b, "a + b", 1.2, lambda: ctarget.add_(cb))


def linear() -> Iterator[Row]:
    """`F.linear` against the same in `jax.jit`."""
    cx, cw, cb = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE), torch.randn(SIZE)
    x, w, b = (t.to("jax") for t in (cx, cw, cb))
    jx, jw, jb = (jnp.asarray(t.numpy()) for t in (cx, cw, cb))
    compiled = jax.jit(lambda x, w, b: x @ w.T + b)
    with torch.no_grad():
        yield ratio(
            "linear",
            "F.linear",
            lambda: F.linear(x, w, b),
            lambda: compiled(jx, jw, jb),
            "jax.jit",
            3.0,
            lambda: F.linear(cx, cw, cb),
        )


def threads(count: int = 3, adds: int = 2000, rounds: int = 5) -> Iterator[Row]:
    """Additions per second from three threads, against one."""
    try:
        a, b = torch.randn(SIZE, SIZE).to("jax"), torch.randn(SIZE, SIZE).to("jax")

        def work() -> None:
            with torch.no_grad():
                for _ in range(adds):
                    result = a + b
                wait(result)

        def rate(n: int) -> float:
            started = [threading.Thread(target=work) for _ in range(n)]
            start = time.perf_counter()
            for thread in started:
                thread.start()
            for thread in started:
                thread.join()
            return n * adds / (time.perf_counter() - start)

        rate(1)
        rate(count)
        one, several = [], []
        for _ in range(rounds):
            one.append(rate(1))
            several.append(rate(count))
        best_one, best_several = sorted(one)[rounds // 2], sorted(several)[rounds // 2]
    except Exception as error:
        yield failed("threads", f"op rate, {count} threads", error)
        return
    yield Row(
        "threads",
        f"op rate, {count} threads",
        best_several / best_one,
        "x",
        "one thread",
        1.0,
        1 / best_several,
        1 / best_one,
        more=True,
    )
