"""What a compiled function has written is seen by whoever looks, whenever that is."""

from __future__ import annotations

import gc
import operator
import threading
import weakref

import jax
import pytest
import torch
import torch.nn as nn
import torchax
from torchax._marks import marks
from torchax_interop._held import HeldStorage

from helpers import train_step


def _counters(n=3):
    counters = [torch.zeros(2, device="jax") for _ in range(n)]

    @torchax.compile
    def step(x):
        for i, t in enumerate(counters):
            t.add_(x * (i + 1))
        return x.sum()

    return counters, step


def _held(tensors):
    return [type(t._s) is HeldStorage for t in tensors]


def test_a_step_after_a_step_holds_what_it_wrote():
    counters, step = _counters()
    x = torch.ones(2, device="jax")
    for _ in range(5):
        step(x)
    assert all(_held(counters))
    assert counters[1].tolist() == [10, 10]
    assert not any(_held(counters))
    assert [t[0].item() for t in counters] == [5, 10, 15]


@pytest.mark.parametrize("calls", [1, 2, 3, 20])
def test_reads_and_writes_between_calls(calls):
    counters, step = _counters()
    x = torch.ones(2, device="jax")
    view = counters[0][:1]
    expected = 0
    for round_ in range(6):
        for _ in range(calls):
            step(x)
        expected += calls
        assert view.item() == expected  # views remember the version that they read
        if round_ % 2:
            counters[0].mul_(2)  # written first, not read
            expected *= 2
        assert view.item() == expected
        assert counters[2].sum().item() == 6 * calls * (round_ + 1)


def test_two_functions_that_write_the_same_tensors():
    t = torch.zeros((), device="jax")
    u = torch.zeros((), device="jax")

    @torchax.compile
    def add(x):
        t.add_(x)
        u.add_(t)
        return t * 1

    @torchax.compile
    def double():
        u.mul_(2)
        t.mul_(2)

    one, a, b = torch.ones((), device="jax"), 0.0, 0.0
    for i in range(40):
        if i % 7 in (2, 3):
            double()
            a, b = 2 * a, 2 * b
        else:
            assert add(one).item() == a + 1
            a, b = a + 1, b + a + 1
    assert (t.item(), u.item()) == (a, b)


def test_a_training_step_whose_gradients_and_state_are_read():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to("jax")
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in models]

    def step(i, x):
        optimizers[i].zero_grad()
        loss = models[i](x).square().mean()
        loss.backward()
        optimizers[i].step()
        return loss.detach()

    compiled = torchax.compile(step)
    for k in range(12):
        x = torch.randn(5, 3)
        torch.testing.assert_close(compiled(1, x.to("jax")).cpu(), step(0, x), rtol=1e-4, atol=1e-5)
        if k % 5 == 4:
            for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
                torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-3, atol=1e-5)
            state = torchax.interop.torch_view(torchax.interop.jax_view(models[1].state_dict()))
            for key, value in models[0].state_dict().items():
                torch.testing.assert_close(state[key].cpu(), value, rtol=1e-3, atol=1e-4)
    for s, t in zip(optimizers[0].state.values(), optimizers[1].state.values(), strict=True):
        torch.testing.assert_close(t["exp_avg"].cpu(), s["exp_avg"], rtol=1e-3, atol=1e-5)


def test_the_function_may_go_first():
    counters, step = _counters()
    for _ in range(4):
        step(torch.ones(2, device="jax"))
    assert all(_held(counters))
    del step
    gc.collect()
    assert counters[2].tolist() == [12, 12]


def test_a_call_that_fails_leaves_what_was_held():
    counters, step = _counters()
    x = torch.ones(2, device="jax")
    for _ in range(4):
        step(x)
    gone = torch.ones(2, device="jax")
    gone.jax().delete()
    with pytest.raises(torchax.errors.BufferDonated):
        step(gone)
    assert counters[0].tolist() == [4, 4]
    step(x)
    assert counters[0].tolist() == [5, 5]


def test_readers_in_another_thread():
    t = torch.zeros((), device="jax")

    @torchax.compile(donate_state=False)
    def step(x):
        t.add_(x)

    seen, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            seen.append(t.item())

    reader = threading.Thread(target=read)
    reader.start()
    one = torch.ones((), device="jax")
    try:
        for _ in range(300):
            step(one)
    finally:
        stop.set()
        reader.join()
    assert t.item() == 300
    assert seen == sorted(seen)


@pytest.mark.parametrize("fails", [False, True])
def test_what_only_garbage_holds_does_not_stay(fails):
    frozen = gc.get_freeze_count()

    @torchax.compile
    def step(x):
        ring = [x * 2]
        ring.append(ring)
        if fails:
            raise KeyError("of the user")
        return x + 1

    x = torch.ones(2, device="jax")
    if fails:
        with pytest.raises(KeyError, match="of the user"):
            step(x)
    else:
        assert step(x).tolist() == [2, 2] and step(x).tolist() == [2, 2]
        assert step.cache_info()[:2] == (1, 1) and not step.cache_info().reasons
    assert gc.get_freeze_count() == frozen  # a recording sets the heap aside, and puts it back


def test_a_held_tensor_does_not_keep_the_others():
    counters, step = _counters()
    for _ in range(4):
        step(torch.ones(2, device="jax"))
    storages = [weakref.ref(t._s) for t in counters]
    first = counters[0]
    assert all(_held(counters))
    del counters, step
    jax.clear_caches()
    gc.collect()
    assert [s() is None for s in storages] == [False, True, True]
    assert first.tolist() == [4, 4]


# ---------------------------------------------------------------------- gradients that change between calls
class _Frozen(torch.autograd.Function):
    """Marks its first input as written, and touches nothing."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return g, g


def _accumulate_by_node(p):
    p.expand_as(p).grad_fn.next_functions[0][0](torch.ones_like(p))


GRADIENT_CHANGES = {
    "set": lambda p: setattr(p, "grad", torch.ones_like(p)),
    "none": lambda p: setattr(p, "grad", None),
    "deleted": lambda p: delattr(p, "grad"),
    "zero_grad": lambda p: torch.optim.SGD([p], 0.1).zero_grad(),
    "backward": lambda p: (p * p).sum().backward(),
    "backward of a leaf": lambda p: p.backward(torch.ones_like(p)),
    "create_graph": lambda p: (p**3).sum().backward(create_graph=True),
    "by its node": _accumulate_by_node,
    "another tensor": lambda p: setattr(p, "grad", p.grad.detach() * 2),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("change", GRADIENT_CHANGES.values(), ids=GRADIENT_CHANGES.keys())
def test_gradients_that_change_between_calls(change, zero):
    """Whoever changes them, by whatever way: the next calls start from what is there, and `.grad` is there afterwards."""
    seen = []
    for compiled in (False, True):
        p = nn.Parameter(torch.tensor([1.0, 2.0], device="jax"))

        def step(x, p=p):
            if zero:
                p.grad = None
            (p * x).sum().backward()

        run = torchax.compile(step) if compiled else step
        x, found = torch.tensor([3.0, 4.0], device="jax"), []
        for _ in range(3):
            run(x)
        for _ in range(2):
            change(p)
            run(x)
            run(x)
            found.append(None if p.grad is None else p.grad.tolist())
            p.grad = None if p.grad is None else p.grad.detach()
        seen.append(found)
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_gradient_is_marked_by_whatever_replaces_it():
    """What compiled calls go by in place of a look at each parameter."""
    for name, change in GRADIENT_CHANGES.items():
        for first in (True, False):
            if first and name == "another tensor":
                continue
            p = nn.Parameter(torch.tensor([1.0, 2.0], device="jax"))
            p.grad = None if first else torch.ones_like(p)
            before, mark = p.grad, marks.grads
            change(p)
            assert (p.grad is before) or marks.grads is not mark, name


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize(
    "change",
    [
        lambda p, w: setattr(p, "requires_grad", False),
        lambda p, w: p.requires_grad_(False),
        lambda p, w: p.detach_(),
        lambda p, w: torch.detach_(p),
        lambda p, w: torch.ops.aten.detach_(p),
        lambda p, w: nn.ParameterList([p]).requires_grad_(False),
        lambda p, w: torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 2, requires_grad=False)),
        lambda p, w: _Frozen.apply(w, p),
        lambda p, w: w.mul_(p),
        lambda p, w: w.requires_grad_(),
    ],
    ids=["set", "method", "detach_", "function", "op", "module", "swapped", "marked", "in place", "other"],
)
def test_requires_grad_that_changes_between_calls(change):
    p = nn.Parameter(torch.tensor([1.0, 2.0], device="jax"))
    w = nn.Parameter(torch.tensor([5.0, 6.0], device="jax"), requires_grad=False)

    @torchax.compile
    def fn(x):
        return p * x + w

    x = torch.tensor([3.0, 4.0], device="jax", requires_grad=True)
    for _ in range(3):
        fn(x)
    change(p, w)
    got, want = fn(x), p * x + w
    assert got.tolist() == want.tolist() and got.requires_grad
    assert fn.cache_info().misses == 2
    leaves = [t for t in (x, p, w) if t.requires_grad] if w.is_leaf else [x]
    grads = [torch.autograd.grad(y.sum(), leaves) for y in (got, want)]
    assert [g.tolist() for g in grads[0]] == [g.tolist() for g in grads[1]]


def _trained(device, steps, between, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    step = train_step(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    run = torchax.compile(step, **options) if device == "jax" else step
    x = torch.linspace(-1, 1, 12).view(3, 4).to(device)
    seen = []
    for i in range(steps):
        loss = run(x)
        if i in between:
            seen.append(loss.item())
            seen += [p.grad.sum().item() for p in model.parameters()]
            between[i](model)
    after = [t.tolist() for p in model.parameters() for t in (p.grad, p)]
    return [*seen, *after], model, run, x


def _cleared(model):
    for p in model.parameters():
        p.grad = None


def _doubled(model):
    for p in model.parameters():
        p.grad.mul_(2)


def _replaced(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def _swapped(model):
    model[0].weight.grad = model[0].weight.grad.clone()
    model[2].weight.requires_grad_(False).requires_grad_(True)


@pytest.mark.parametrize("between", [lambda m: None, _cleared, _doubled, _replaced, _swapped])
def test_gradients_written_over_the_last_ones(between):
    when = {3: between, 5: between, 6: between}
    expected, *_ = _trained("cpu", 9, when)
    found, *_ = _trained("jax", 9, when)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("donate", [True, False])
def test_gradients_are_held_once(donate):
    *_, model, run, x = _trained("jax", 4, {}, donate_state=donate)
    size = sum(p.numel() * 4 for p in model.parameters())
    memory = run.lower(x).compile().memory_analysis()
    assert memory.alias_size_in_bytes == (3 * size if donate else 0)  # parameters, momentum, gradients
    last = [p.grad.jax() for p in model.parameters()]
    run(x)
    assert [a.is_deleted() for a in last] == [donate] * 4


def _set_data(t):
    t.data = torch.full_like(t, 3.0)


def _swap(t):
    torch.utils.swap_tensors(t, torch.full((2,), 3.0, device="jax"))


@pytest.mark.parametrize("change", [_set_data, _swap])
def test_another_storage_is_seen(change):
    t = torch.ones(2, device="jax")
    double = torchax.compile(lambda: t * 2)
    assert [double().tolist() for _ in range(3)] == [[2, 2]] * 3
    change(t)
    assert double().tolist() == [6, 6]
    t.add_(1)
    assert double().tolist() == [8, 8]


@pytest.mark.parametrize(
    "begin",
    [
        lambda t, w: t.requires_grad_(),
        lambda t, w: setattr(t, "requires_grad", True),
        lambda t, w: t.mul_(w),
        lambda t, w: t[:1].add_(w[:1]),
        lambda t, w: t.copy_(w),
        operator.iadd,
    ],
)
def test_who_requires_a_gradient_is_seen(begin):
    t, w = torch.ones(2, device="jax"), torch.ones(2, device="jax", requires_grad=True)
    double = torchax.compile(lambda: t * 2)
    assert not any(double().requires_grad for _ in range(3))
    begin(t, w)
    assert double().requires_grad
    double().sum().backward()
    assert (t if t.is_leaf else w).grad is not None
    t.detach_() if not t.is_leaf else t.requires_grad_(False)
    assert not double().requires_grad
