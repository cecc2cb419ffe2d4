"""Autograd, `torch.func`, checkpointing and their errors on device ``jax``, each program compared with CPU."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from helpers import assert_same

F = torch.nn.functional


def leaf(device, *shape, dtype=torch.float32):
    n = torch.Size(shape).numel()
    return (torch.linspace(-1, 1.5, n, dtype=torch.float64).reshape(shape).to(dtype)).to(device).requires_grad_()


def both(program, **tolerances):
    """Run a program of a device on jax and on CPU, and compare what it returns."""
    assert_same(program("jax"), program("cpu"), **tolerances)


# Programs that return tensors -------------------------------------------------------------------------------------


def backward_of_everything(d):
    a, b = leaf(d, 3, 4), leaf(d, 4, 2)
    loss = (a @ b).tanh().sum() + a[1:, ::2].exp().mean() + (a.t() * 2).relu().sum()
    loss.backward()
    return loss.detach(), a.grad, b.grad


def accumulation(d):
    a = leaf(d, 3)
    for i in range(3):
        (a * i).sum().backward()
    first = a.grad.clone()
    a.grad = None
    (a**2).sum().backward()
    a.grad.zero_()
    return first, a.grad


def second_derivatives(d):
    a = leaf(d, 4, dtype=torch.float64)
    (g,) = torch.autograd.grad((a**3).sin().sum(), a, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), a, create_graph=True)
    (t,) = torch.autograd.grad(h.sum(), a)
    return g.detach(), h.detach(), t


def double_backward_of_layers(d):
    torch.manual_seed(0)
    m = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.GELU(), torch.nn.Linear(4, 1)).to(d)
    x = leaf(d, 2, 3)
    (g,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    (g.square().sum() + g.norm()).backward()
    return x.grad, [p.grad for p in m.parameters() if p.grad is not None]


def double_backward_of_attention(d):
    q, k, v = leaf(d, 1, 2, 3, 4), leaf(d, 1, 2, 3, 4), leaf(d, 1, 2, 3, 4)
    with torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH
    ):  # the only one of CPU torch with second derivatives
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    (g,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    g.square().sum().backward()
    return q.grad, k.grad, v.grad


def in_place_on_views(d):
    a = leaf(d, 4, 3)
    b = a * 1
    b[1] *= 3
    b[:, 0].add_(b[:, 1])
    b.t()[2].neg_()
    b.view(-1)[::2].mul_(2)
    (b * b).sum().backward()
    return b.detach(), a.grad


def masked_writes(d):
    a = leaf(d, 5)
    b = a.clone()
    b[b > 0] = 7.0
    b.masked_fill_(b < -0.5, 0.0)
    b.index_copy_(0, torch.tensor([1], device=d), a[:1] * 5)
    b.sum().backward()
    return b.detach(), a.grad


def retain_and_detach(d):
    a = leaf(d, 3)
    b = a * 2
    b.retain_grad()
    c = b.detach()
    c.requires_grad_()
    ((b * c).sum()).backward(retain_graph=True)
    (b.sum()).backward()
    return a.grad, b.grad, c.grad


def external_gradient(d):
    a = leaf(d, 2, 3)
    y = torch.stack([a, a * 2])
    y.backward(torch.arange(12.0, device=d).reshape(2, 2, 3))
    grads = torch.autograd.grad([a.sum(), (a * a).sum()], [a], [torch.tensor(2.0, device=d), None])
    return a.grad, grads


def batched_gradients(d):
    a = leaf(d, 3)
    y = a**2
    return torch.autograd.grad(y, a, torch.eye(3, device=d), is_grads_batched=True)


def unused_and_none(d):
    a, b = leaf(d, 2), leaf(d, 2)
    unused = torch.autograd.grad(a.sum(), [a, b], allow_unused=True)
    zeros = torch.autograd.grad(a.sum(), [a, b], materialize_grads=True)
    return unused[0], zeros


def inputs_argument(d):
    a, b = leaf(d, 2), leaf(d, 2)
    (a * b).sum().backward(inputs=[a])
    assert b.grad is None
    return a.grad


def complex_gradients(d):
    a = leaf(d, 3).detach().to(torch.complex64).mul(1 + 2j).requires_grad_()
    (a.abs() + a.real * a.imag + (a * a.conj()).real).sum().backward()
    return a.grad


def mixed_dtypes(d):
    a, b = leaf(d, 3, dtype=torch.float16), leaf(d, 3, dtype=torch.float64)
    (a.double() * b + a.float()).sum().backward()
    return a.grad, b.grad


def gather_scatter(d):
    a = leaf(d, 4, 3)
    i = torch.tensor([[0, 2], [1, 1]], device=d)
    (a[i].sum() + a.gather(1, i).square().sum() + F.embedding(i, a).prod()).backward()
    return a.grad


def custom_function(d):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, power):
            ctx.save_for_backward(x)
            ctx.power = power
            out = x**power
            flag = x > 0
            ctx.mark_non_differentiable(flag)
            return out, flag

        @staticmethod
        def backward(ctx, g, _):
            (x,) = ctx.saved_tensors
            assert ctx.needs_input_grad == (True, False)
            return g * ctx.power * x ** (ctx.power - 1), None

    a = leaf(d, 3)
    out, flag = Cube.apply(a, 3)
    (g,) = torch.autograd.grad(out.sum(), a, create_graph=True)
    g.sum().backward()
    return out.detach(), flag, g.detach(), a.grad


def custom_in_place(d):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx, g):
            return g * 2

    a = leaf(d, 3)
    b = a * 1
    c = Double.apply(b)
    assert c is b
    c.sum().backward()
    return c.detach(), a.grad


def saved_tensor_hooks(d):
    log = []

    def pack(t):
        log.append(tuple(t.shape))
        return t.cpu()

    a, b = leaf(d, 2, 3), leaf(d, 3, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.to(d)):
        loss = (a @ b).exp().sum()
    loss.backward()
    assert (2, 3) in log and (3, 2) in log
    return a.grad, b.grad


def save_on_cpu(d):
    a = leaf(d, 3)
    with torch.autograd.graph.save_on_cpu():
        loss = (a.exp() * a).sum()
    loss.backward()
    return a.grad


def anomaly(d):
    a = leaf(d, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            (a * 2).exp().sum().backward()
    return a.grad


def grad_modes(d):
    a = leaf(d, 3)
    with torch.no_grad():
        b = a * 2
        assert not b.requires_grad
        with torch.enable_grad():
            c = a * 3
    torch.set_grad_enabled(True)
    assert c.requires_grad and not a.detach().requires_grad
    a.requires_grad_(False)
    a.add_(1)
    a.requires_grad_(True)
    (a * c.detach()).sum().backward()
    return b, c.detach(), a.grad


def inference(d):
    with torch.inference_mode():
        x = torch.linspace(-1, 1, 24).reshape(2, 3, 4).to(d)
        w = torch.linspace(0, 1, 12).reshape(3, 4).to(d)
        assert x.is_inference()
        out = [
            F.linear(x, w), F.layer_norm(x, (4,)), F.cross_entropy(x[0], torch.tensor([0, 1, 2], device=d)), x.matmul(w.t()),
            F.scaled_dot_product_attention(x, x, x), x.reshape(6, 4).softmax(-1), torch.einsum("bij,kj->bik", x, w), x.to(torch.float64),
            F.conv1d(x, w.view(1, 3, 4)), x.flatten(), x.std(), torch.nn.functional.gelu(x).chunk(2), x.type_as(w),
        ]  # fmt: skip
        x[0] += 1
        out.append(x.clone())
    return [o.clone() if isinstance(o, torch.Tensor) else tuple(o) for o in out]


def checkpointed(d, **options):
    torch.manual_seed(0)
    m = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).to(d)
    x = leaf(d, 2, 3)
    y = checkpoint(m, x, **options) + checkpoint(lambda a, *, scale: m(a) * scale, x, scale=2.0, use_reentrant=False)
    y.square().sum().backward()
    return y.detach(), x.grad, [p.grad for p in m.parameters()]


def forward_mode(d):
    a, t = leaf(d, 3).detach(), torch.arange(3.0, device=d)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, t)
        out = (
            (dual.sin() * dual).sum()
            + F.softmax(dual, 0)[1]
            + torch.nn.functional.linear(dual, torch.ones(2, 3, device=d)).sum()
        )
        value, tangent = torch.autograd.forward_ad.unpack_dual(out)
    return value, tangent


def jacobians(d):
    a = leaf(d, 3, dtype=torch.float64).detach()
    f = lambda x: torch.stack([x.prod(), (x**2).sum(), x[0].sin()])
    return (
        torch.autograd.functional.jacobian(f, a), torch.autograd.functional.hessian(lambda x: (x**3).sum() * x[0], a),
        torch.autograd.functional.vjp(f, a, torch.ones(3, dtype=a.dtype, device=d)), torch.autograd.functional.jvp(f, a, torch.ones_like(a)),
    )  # fmt: skip


def func_transforms(d):
    torch.manual_seed(0)
    m = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(d)
    params = {k: v.detach() for k, v in m.named_parameters()}
    x, y = leaf(d, 5, 3).detach(), leaf(d, 5, 1).detach()

    def loss(p, x, y):
        return F.mse_loss(torch.func.functional_call(m, p, (x,)), y)

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
    total, value = torch.func.grad_and_value(loss)(params, x, y)
    assert next(m.parameters()).grad is None
    return per_sample, total, value


def func_jacobians(d):
    a = leaf(d, 3).detach()
    f = lambda x: (x.outer(x).sin() @ torch.ones(3, device=d)).cumsum(0)
    out, vjp = torch.func.vjp(f, a)
    return (
        out, vjp(torch.ones_like(out)), torch.func.jvp(f, (a,), (torch.ones_like(a),)), torch.func.jacrev(f)(a), torch.func.jacfwd(f)(a),
        torch.func.hessian(lambda x: f(x).sum())(a), torch.func.linearize(f, a)[1](torch.ones_like(a)),
    )  # fmt: skip


def vmaps(d):
    a, b = leaf(d, 4, 3).detach(), leaf(d, 3, 4).detach()
    dot = torch.func.vmap(torch.dot, in_dims=(0, 1))
    nested = torch.func.vmap(torch.func.vmap(lambda x, y: x * y + 1))
    chunks = torch.func.vmap(lambda x: x.softmax(0), chunk_size=2)
    layers = torch.func.vmap(lambda x: F.layer_norm(x, (3,)).relu())
    inplace = torch.func.vmap(lambda x: x.clone().squeeze_().add_(x.sum()))
    return (
        dot(a, b),
        nested(a, b.t()),
        chunks(a),
        layers(a),
        inplace(a),
        torch.func.vmap(lambda x: x.view(3, 1).t(), out_dims=1)(a),
    )


def stacked_modules(d):
    torch.manual_seed(0)
    models = [torch.nn.Linear(2, 2).to(d) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    return torch.func.vmap(lambda p, b, x: torch.func.functional_call(models[0], (p, b), (x,)), (0, 0, None))(
        params, buffers, leaf(d, 4, 2).detach()
    ).detach()


def functional_call_ties(d):
    m = torch.nn.Linear(2, 2).to(d)
    new = {"weight": torch.ones(2, 2, device=d, requires_grad=True), "bias": torch.zeros(2, device=d)}
    out = torch.func.functional_call(m, new, (leaf(d, 1, 2).detach(),))
    out.sum().backward()
    return out.detach(), new["weight"].grad


def gradient_of_copies(d):
    a = leaf("cpu", 3)
    b = a.to(d).double()
    c = torch.zeros(3, dtype=torch.float64, device=d)
    c.copy_(b * 2)
    c.sum().backward()
    return (a.grad.to(d),)


PROGRAMS = [
    backward_of_everything, accumulation, second_derivatives, double_backward_of_layers, double_backward_of_attention, in_place_on_views,
    masked_writes, retain_and_detach, external_gradient, batched_gradients, unused_and_none, inputs_argument, complex_gradients,
    mixed_dtypes, gather_scatter, custom_function, custom_in_place, saved_tensor_hooks, save_on_cpu, anomaly, grad_modes, inference,
    forward_mode, jacobians, func_transforms, func_jacobians, vmaps, stacked_modules, functional_call_ties, gradient_of_copies,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_program(program):
    both(program, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "preserve_rng_state": False}],
    ids=str,
)
def test_checkpoint(options):
    both(lambda d: checkpointed(d, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_draws_the_same_dropout_again(reentrant):
    x = torch.ones(64, device="jax", requires_grad=True)
    seen = []

    def f(t):
        y = F.dropout(t, 0.5)
        seen.append(y.detach().tolist())
        return y * 1

    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        checkpoint(f, x, use_reentrant=reentrant).sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1] == x.grad.tolist()
    after = F.dropout(torch.ones(64, device="jax"), 0.5).tolist()
    assert after != seen[0], "the state goes on after the recomputation"


def test_checkpoint_sequential_and_selective():
    torch.manual_seed(0)
    m = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(4)])
    grads = []
    for d in ("jax", "cpu"):
        m = m.to(d)
        m.zero_grad()
        checkpoint_sequential(m, 2, leaf(d, 2, 3), use_reentrant=False).sum().backward()
        grads.append([p.grad.cpu() for p in m.parameters()])
    torch.testing.assert_close(*grads)


def test_leaves_no_gradient_to_the_next_program():
    a = torch.ones(2, device="jax")
    a.requires_grad = True
    assert a.is_leaf and a.grad is None and (a * 2).grad_fn is not None and a.grad_fn is None
    b = a.detach()
    assert b.data_ptr() == a.data_ptr() and not b.requires_grad
    with torch.no_grad():
        a[0] = 5
    assert b[0] == 5
    assert a.output_nr == 0 and (a * 2)._version == 0


# Errors -----------------------------------------------------------------------------------------------------------


def _set_grad(d):
    leaf(d, 3).grad = torch.ones(2, device=d)


ERRORS = {
    "in-place on a leaf": lambda d: leaf(d, 3).add_(1),
    "in-place on a view of a leaf": lambda d: leaf(d, 3)[0].mul_(2),
    "write to a leaf": lambda d: leaf(d, 3).__setitem__(0, 1.0),
    "no graph": lambda d: torch.ones(2, device=d).sum().backward(),
    "not a scalar": lambda d: (leaf(d, 3) * 2).backward(),
    "twice": lambda d: [loss.backward() for loss in [leaf(d, 3).exp().sum()] * 2],
    "integers": lambda d: torch.ones(2, dtype=torch.int64, device=d).requires_grad_(),
    "shape of gradient": lambda d: (leaf(d, 3) * 2).backward(torch.ones(2, device=d)),
    "unused": lambda d: torch.autograd.grad(leaf(d, 2).sum(), leaf(d, 2)),
    "detach_ of a view": lambda d: (leaf(d, 3) * 1)[0:1].detach_(),
    "flag of a non-leaf": lambda d: (leaf(d, 3) * 1).requires_grad_(False),
    "assigned gradient": _set_grad,
    "numpy": lambda d: leaf(d, 3).numpy(),
    "inference outside": lambda d: (_inference_tensor(d) * leaf(d, 3)).sum().backward(),
    "inference in-place": lambda d: _inference_tensor(d).add_(1),
    "unbind in-place": lambda d: (leaf(d, 3, 2) * 1).unbind(0)[0].mul_(2),
    "vmap of item": lambda d: torch.func.vmap(lambda x: x.sum().item())(leaf(d, 2, 2)),
    "vmap sizes": lambda d: torch.func.vmap(torch.add)(leaf(d, 2), leaf(d, 3)),
    "functional grad": lambda d: torch.func.grad(lambda x: x * 2)(leaf(d, 3)),
    "hook on no grad": lambda d: torch.ones(2, device=d).register_hook(print),
}


def _inference_tensor(d):
    with torch.inference_mode():
        return torch.ones(3, device=d)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_torchs(name):
    with pytest.raises(Exception) as want:
        ERRORS[name]("cpu")
    with pytest.raises(type(want.value)) as got:
        ERRORS[name]("jax")
    normal = lambda e: re.sub(r"(?i)torch\.\w*tensor|jax|cpu|lazy", "", re.sub(r"\s+", " ", str(e.value)))[:120]
    assert normal(got) == normal(want)


@pytest.mark.parametrize(
    "save",
    [lambda a: a.exp(), lambda a: a * a, lambda a: F.linear(a, a), lambda a: a.softmax(0), lambda a: a.sigmoid()],
)
def test_a_saved_tensor_that_was_changed_is_noticed(save):
    messages = []
    for d in ("cpu", "jax"):
        a = leaf(d, 3) * 1
        out = save(a)
        (out if save(a).grad_fn.name() in ("ExpBackward0", "SoftmaxBackward0", "SigmoidBackward0") else a).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            out.sum().backward()
        messages.append(re.search(r"is at version \d+; expected version \d+", str(caught.value)).group())
    assert messages[0] == messages[1]


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        raise KeyError("from the backward")


@pytest.mark.parametrize("where", ["function", "hook", "tensor hook", "accumulate hook", "checkpoint"])
def test_an_exception_in_backward_arrives_and_nothing_is_broken(where):
    a = leaf("jax", 3)

    def fail(*_):
        raise KeyError("from the backward")

    y = a * 3
    if where == "function":
        y = Failing.apply(y)
    elif where == "hook":
        y.grad_fn.register_hook(fail)
    elif where == "tensor hook":
        y.register_hook(fail)
    elif where == "checkpoint":
        y = checkpoint(Failing.apply, y, use_reentrant=False)
    else:
        a.register_post_accumulate_grad_hook(fail)
    with pytest.raises(KeyError, match="from the backward"):
        (y * 2).sum().backward()
    b = leaf("jax", 3)
    (b * 2).sum().backward()
    assert b.grad.tolist() == [2, 2, 2]
    assert where == "accumulate hook" or a.grad is None


def test_anomaly_mode_names_the_forward_line():
    a = torch.zeros(1, device="jax", requires_grad=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with (
            pytest.raises(RuntimeError, match="returned nan values in its 0th output"),
            torch.autograd.detect_anomaly(),
        ):
            (a.sqrt() * 0 / 1).sum().backward()
    assert any("test_autograd" in str(w.message) for w in seen)


def test_gradcheck():
    a = leaf("jax", 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: (x.sin() * x).cumsum(0), (a,), check_batched_grad=True, check_forward_ad=True
    )
    assert torch.autograd.gradgradcheck(lambda x: x.tanh() * x, (a,))
