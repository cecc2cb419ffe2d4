"""`torch.cond`, `while_loop`, `scan` and `associative_scan`: values and gradients as Python's control flow on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torch._higher_order_ops import associative_scan, scan
from torchax.errors import TracerEscaped

WAYS = {"compiled": lambda fn: torchax.compile(fn), "eager": lambda fn: fn}
both = pytest.mark.parametrize("way", WAYS)


def loop(f: Any, init: Any, xs: torch.Tensor, dim: int = 0, reverse: bool = False) -> Any:
    """What scan means."""
    ys, carry = [], init
    for i in reversed(range(xs.shape[dim])) if reverse else range(xs.shape[dim]):
        carry, y = f(carry, xs.select(dim, i))
        ys.append(y)
    return carry, torch.stack(ys[::-1] if reverse else ys, dim)


def same_gradients(got: Any, got_by: Any, want: Any, want_by: Any) -> None:
    torch.testing.assert_close([t.detach().cpu() for t in got], [t.detach() for t in want])
    g = torch.autograd.grad(sum(t.square().sum() for t in got), got_by)
    w = torch.autograd.grad(sum(t.square().sum() for t in want), want_by)
    torch.testing.assert_close([t.cpu() for t in g], list(w))


@both
@pytest.mark.parametrize("choice", [True, False])
def test_cond_with_parameters_and_variables_closed_over(choice: bool, way: str, pair: Any) -> None:
    x, jx = pair(4, 3)
    w, jw = pair(3, 3, requires_grad=True)

    def fn(p: Any, x: torch.Tensor, w: torch.Tensor, branch: Any) -> torch.Tensor:
        h = x @ w
        return branch(p, lambda y: (h * y).sin() * w.sum(), lambda y: (h + 1).detach() * w.mean() + y, (x,))

    run = WAYS[way](lambda p: fn(p, jx, jw, torch.cond))
    got = run(torch.tensor([choice], device="jax"))
    want = fn(choice, x, w, lambda p, t, f, o: t(*o) if p else f(*o))
    same_gradients([got], [jw], [want], [w])


def test_one_program_for_both_branches(compile_counter: Any) -> None:
    fn = torchax.compile(lambda x: torch.cond(x.sum() > 0, lambda a: {"y": a * 2}, lambda a: {"y": -a}, (x,)))
    x = torch.ones(3, device="jax")
    y = -x
    assert fn(x)["y"].tolist() == [2, 2, 2]
    with compile_counter.expect(0):
        z = fn(y)["y"]
    assert z.tolist() == [1, 1, 1] and fn.cache_info().hits == 1


def test_state_written_in_a_branch() -> None:
    norm, seen = nn.BatchNorm1d(3).to("jax"), torch.zeros((), device="jax")

    @torchax.compile
    def fn(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        def train(x: torch.Tensor) -> torch.Tensor:
            seen.add_(1)
            return F.dropout(norm(x), 0.5)

        return torch.cond(p, train, lambda x: x * 1, (x,))

    x, twin = torch.randn(8, 3, device="jax"), nn.BatchNorm1d(3).to("jax")
    yes, no = torch.tensor(True, device="jax"), torch.tensor(False, device="jax")
    results = []
    for p in (yes, no, yes):
        results.append(fn(p, x))
    for _ in range(2):
        twin(x)
    assert seen.item() == 2 and norm.num_batches_tracked.item() == 2
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    assert not torch.equal(results[0] == 0, results[2] == 0), "masks differ"
    torch.testing.assert_close(results[1], x)


def test_custom_backward_and_no_grad_count_inside() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * 2

    def step(c: torch.Tensor, x: torch.Tensor) -> Any:
        with torch.no_grad():
            scale = x * 3
        return Twice.apply(c) + x * scale, c * 1

    x = torch.tensor([1.0, 2.0], device="jax", requires_grad=True)
    c = torch.ones((), device="jax", requires_grad=True)
    got = torch.autograd.grad(torchax.compile(lambda c, x: scan(step, c, x)[0])(c, x), (c, x))
    want = torch.autograd.grad(loop(step, c, x)[0], (c, x))
    torch.testing.assert_close(got, want)


@both
@pytest.mark.parametrize("dim, reverse", [(0, False), (1, True)])
def test_scan(dim: int, reverse: bool, way: str, pair: Any) -> None:
    w, jw = pair(3, 3, requires_grad=True)
    xs, jxs = pair(*((5, 2, 3) if dim == 0 else (2, 5, 3)), requires_grad=True)
    init, jinit = pair(2, 3)

    def cell(w: torch.Tensor) -> Any:
        def f(c: torch.Tensor, x: torch.Tensor) -> Any:
            c = torch.tanh(c @ w + x)
            return c, c * 2

        return f

    run = WAYS[way](lambda i, x: scan(cell(jw), i, x, dim=dim, reverse=reverse))
    same_gradients(run(jinit, jxs), [jxs, jw], loop(cell(w), init, xs, dim, reverse), [xs, w])


@both
def test_scan_over_nests_draws_as_a_loop_does(way: str) -> None:
    def f(c: Any, x: Any) -> Any:
        total = F.dropout(c["total"] + x["a"] * x["b"], 0.5)
        return {"total": total, "n": c["n"] + 1}, (x["a"], total)

    def run(over: Any, a: Any, b: Any) -> Any:
        return over(
            f, {"total": torch.zeros(3, device="jax"), "n": torch.zeros((), dtype=torch.int64, device="jax")}, a, b
        )

    def through_scan(f: Any, init: Any, a: Any, b: Any) -> Any:
        return scan(f, init, {"a": a, "b": b})

    def through_loop(f: Any, init: Any, a: Any, b: Any) -> Any:
        ys = []
        for i in range(len(a)):
            init, y = f(init, {"a": a[i], "b": b[i]})
            ys.append(y)
        return init, tuple(torch.stack(t) for t in zip(*ys, strict=True))

    a, b = torch.randn(6, 3, device="jax"), torch.randn(6, 3, device="jax")
    torch.manual_seed(3)
    want = run(through_loop, a, b), torch.rand(2, device="jax")
    torch.manual_seed(3)
    got = WAYS[way](lambda a, b: run(through_scan, a, b))(a, b), torch.rand(2, device="jax")
    torch.testing.assert_close(got, want)


def test_eager_scan_is_compiled_once(compile_counter: Any) -> None:
    w, xs = torch.full((3,), 0.5, device="jax"), torch.ones(4, 3, device="jax")
    init = torch.zeros(3, device="jax")

    def run() -> torch.Tensor:
        def f(c: torch.Tensor, x: torch.Tensor) -> Any:
            return c * w + x, c

        return scan(f, init, xs)[0]

    want = run()
    with compile_counter.expect(0):
        again = run()
    torch.testing.assert_close(again, want)


def test_second_derivatives_through_scan() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = scan(lambda c, x: (c * x, c * x), torch.ones((), device="jax"), x)[0]
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), x)
        return h

    x = torch.tensor([2.0, 3.0, 4.0], device="jax", requires_grad=True)
    assert torchax.compile(fn)(x).tolist() == [7, 6, 5]


@both
def test_associative_scan(way: str, pair: Any) -> None:
    a, ja = pair(2, 6, 3, requires_grad=True)
    b, jb = pair(2, 6, 3, requires_grad=True)
    _, jscale = pair(3, requires_grad=True)

    def recurrence(scale: torch.Tensor) -> Any:
        return lambda x, y: (x[0] * y[0], x[1] * y[0] + y[1] * 1 + 0 * scale.sum())

    def sequential(a: torch.Tensor, b: torch.Tensor) -> Any:
        return loop(
            lambda c, x: (c * x[0] + x[1], c * x[0] + x[1]),
            torch.zeros(2, 3),
            torch.stack([a, b], 1).permute(2, 1, 0, 3),
        )

    run = WAYS[way](lambda a, b: associative_scan(recurrence(jscale), (a, b), 1, combine_mode="generic")[1])
    want = sequential(a, b)[1].transpose(0, 1)
    same_gradients([run(ja, jb)], [ja, jb], [want], [a, b])
    back = associative_scan(torch.add, ja.detach(), -1, reverse=True)
    torch.testing.assert_close(back.cpu(), a.detach().flip(-1).cumsum(-1).flip(-1))


@both
def test_while_loop(way: str) -> None:
    step = torch.full((2,), 3.0, device="jax")

    def fn(x: torch.Tensor) -> Any:
        return torch.while_loop(
            lambda i, v: v["x"].sum() < 50, lambda i, v: (i + 1, {"x": v["x"] + step}), (0, {"x": x})
        )

    run = WAYS[way](fn)
    n, found = run(torch.zeros(2, device="jax"))
    assert n.item() == 9 and n.dtype == torch.int64 and found["x"].tolist() == [27, 27]
    assert run(torch.full((2,), 40.0, device="jax"))[0].item() == 0


@both
def test_while_loop_has_no_gradient(way: str) -> None:
    x = torch.ones(2, device="jax", requires_grad=True)
    y = WAYS[way](lambda x: torch.while_loop(lambda x: x.sum() < 9, lambda x: (x * 2,), (x * 1,)))(x)[0]
    assert y.tolist() == [8, 8]
    with pytest.raises(RuntimeError, match=r"while_loop has no gradient.*scan"):
        y.sum().backward()


def test_a_whole_training_step_around_scan() -> None:
    torch.manual_seed(0)
    cell, head = nn.GRUCell(3, 4).to("jax"), nn.Linear(4, 2).to("jax")
    optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], 1e-2)

    @torchax.compile
    def step(xs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        h, _ = scan(lambda h, x: (cell(x, h), h.sum()), torch.zeros(xs.shape[1], 4), xs)
        loss = F.cross_entropy(head(h), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    xs, y = torch.randn(7, 8, 3, device="jax"), torch.randint(0, 2, (8,), device="jax")
    losses = [step(xs, y).item() for _ in range(8)]
    assert losses[-1] < losses[0] and step.cache_info().misses == 2


# ---------------------------------------------------------------------- mistakes
def test_python_control_flow_names_the_line_and_what_to_use() -> None:
    def python_if(x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    def python_while(x: torch.Tensor) -> torch.Tensor:
        while x.sum() < 10:
            x = x * 2
        return x

    for fn in (python_if, python_while):
        with pytest.raises(TracerEscaped, match=r"test_control_flow\.py:\d+, in python_") as caught:
            torchax.compile(fn)(torch.ones(3, device="jax"))
        assert all(
            n in str(caught.value) for n in ("torch.cond", "torch.while_loop", "scan", "associative_scan", "where")
        )


def test_mistakes() -> None:
    x = torch.ones(3, device="jax")
    p = torch.tensor(True, device="jax")
    h = x.clone().requires_grad_() * 2
    held = {"h": h}
    mistakes: list[tuple[Any, str]] = [
        (lambda: torch.cond(p, lambda a: a, lambda a: a[0], (x,)), r"float32\[3\].*float32\[\].*test_control_flow"),
        (lambda: torch.cond(x > 0, lambda a: a, lambda a: a, (x,)), "one element"),
        (
            lambda: torch.while_loop(lambda a: p, lambda a: (a[0],), (x,)),
            r"takes \(float32\[3\]\).*gives \(float32\[\]\)",
        ),
        (lambda: torch.while_loop(lambda a: F.dropout(a).sum() > 0, lambda a: (a,), (x,)), "do that in body_fn"),
        (lambda: scan(lambda c, a: (c.double(), a), x.sum(), x), r"gives \(float64\[\]\)"),
        (lambda: scan(lambda c, a: c, x.sum(), x), "a pair"),
        (lambda: scan(lambda c, a: (c, a), x.sum(), x, dim=1), "must have dimension 1"),
        (lambda: torch.cond(p, lambda a: a * held["h"], lambda a: a, (x,)), "give it among the operands"),
    ]
    for mistake, words in mistakes:
        with pytest.raises(RuntimeError, match=words):
            torchax.compile(mistake)()
    with pytest.raises(ValueError, match="callable"):
        associative_scan(3, x, 0)


def test_cpu_tensors_still_go_to_torch() -> None:
    assert torch.cond(True, lambda a: a * 2, lambda a: a, (torch.ones(2),)).tolist() == [2, 2]
    compiled = torch.compile(
        lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(torch.ones(2)), torch.ones(2).sin())
