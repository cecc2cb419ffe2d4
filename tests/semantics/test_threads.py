"""Two threads may run and trace at once; what belongs to a thread stays its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import torch
from torchax._execute import is_tracing
from torchax.tensor import Tensor


def in_threads(n, work):
    """Run ``work(i)`` in `n` threads that start together; their results, or the first error."""
    barrier = threading.Barrier(n)

    def start(i):
        barrier.wait(60)
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return [f.result(timeout=240) for f in [pool.submit(start, i) for i in range(n)]]


def train(device, seed, steps=3):
    generator = torch.Generator().manual_seed(seed)
    w = [torch.randn(s, generator=generator).to(device).requires_grad_() for s in ((3, 4), (4,), (4, 1))]
    x, y = torch.randn(5, 3, generator=generator).to(device), torch.randn(5, 1, generator=generator).to(device)
    opt = torch.optim.SGD(w, lr=0.05, momentum=0.9)
    for _ in range(steps):
        opt.zero_grad()
        h = (x @ w[0] + w[1]).tanh() * 1
        h[:, 0] *= 2
        ((h @ w[2] - y) ** 2).mean().backward()
        opt.step()
    return [p.detach().cpu() for p in w]


def test_threads_train_at_once():
    for seed, got in enumerate(in_threads(3, lambda i: train("jax", i))):
        torch.testing.assert_close(got, train("cpu", seed), rtol=1e-4, atol=1e-5)


def test_threads_compile_new_signatures_at_once():
    def work(i):
        return [(torch.ones(n, 3, device="jax") * (i + 1)).cumsum(0).sum().item() for n in range(2, 10)]

    results = in_threads(3, work)
    assert results == [[(i + 1) * 3 * n * (n + 1) / 2 for n in range(2, 10)] for i in range(3)]


def test_one_thread_traces_while_another_runs():
    def work(i):
        if i == 0:

            def f(a):
                t = Tensor(a)
                for _ in range(30):
                    t = t * 2 - t
                assert is_tracing() or isinstance(t.jax(), jax.core.Tracer)
                return t.jax()

            return [jax.jit(lambda a, k=k: f(a) + k)(jnp.ones(4)).sum().item() for k in range(4)]
        out = []
        for k in range(60):
            x = torch.full((4,), float(k), device="jax")
            x[1:] += 1
            out.append(x.sum().item())
            assert not is_tracing()
        return out

    traced, ran, _ = in_threads(3, work)
    assert traced == [4.0, 8.0, 12.0, 16.0] and ran == [4.0 * k + 3 for k in range(60)]


def test_threads_share_a_tensor():
    x = torch.arange(100.0, device="jax")
    views = [x[i * 10 : (i + 1) * 10] for i in range(4)]
    sums = in_threads(4, lambda i: [(views[i] * 2).sum().item() for _ in range(20)])
    assert [s[0] for s in sums] == [2 * sum(range(i * 10, i * 10 + 10)) for i in range(4)] and all(
        len(set(s)) == 1 for s in sums
    )


def test_grad_modes_autocast_and_current_device_are_the_threads_own(jax_devices):
    def work(i):
        if i == 0:
            with torch.no_grad(), torch.autocast("jax", dtype=torch.bfloat16), torch.jax.device(1):
                return [torch.ones(2, 2, device="jax") @ torch.ones(2, 2, device="jax") for _ in range(10)]
        return [torch.ones(2, 2, device="jax").requires_grad_() @ torch.ones(2, 2, device="jax") for _ in range(10)]

    a, b = in_threads(2, work)
    assert all(t.dtype == torch.bfloat16 and t.device.index == 1 and not t.requires_grad for t in a)
    assert all(t.dtype == torch.float32 and t.device.index == 0 and t.requires_grad for t in b)


def test_backward_in_another_thread():
    x = torch.ones(3, device="jax", requires_grad=True)
    loss = (x * 3).sum()
    in_threads(1, lambda i: loss.backward())
    assert x.grad.tolist() == [3, 3, 3]


def test_an_error_in_one_thread_leaves_the_others_alone():
    def work(i):
        if i == 0:
            for _ in range(10):
                try:
                    torch.ones(2, device="jax") + torch.ones(3, device="jax")
                except RuntimeError:
                    continue
            return True
        return sum((torch.ones(2, device="jax") + k).sum().item() for k in range(10)) == 110

    assert in_threads(3, work) == [True] * 3
