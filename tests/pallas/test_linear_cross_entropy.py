"""The loss of a linear layer without its logits: against torch on CPU in float64, and compiled for TPU."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from hypothesis import example, given
from hypothesis import strategies as st
from jax._src.core import jaxprs_in_params
from torch.nn import LinearCrossEntropyOptions

from helpers import examples

pytest.importorskip("torchax_ops_aten")
from torchax_ops_aten import _logits
from torchax_ops_aten.linear_cross_entropy import linear_cross_entropy

_TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-4, 1e-5), torch.bfloat16: (3e-2, 1e-2)}


def _values(loss_of: Any, x: Any, weight: Any, bias: Any) -> list[torch.Tensor]:
    """The loss and the gradients that it gives to the tensors, in float64 on CPU; each loss has a gradient of its own."""
    tensors = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    loss = loss_of(*tensors)
    factors = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()].view(loss.shape)
    (loss * factors.to(loss.device)).sum().backward()
    return [t.detach().cpu().double() for t in (loss, *[t.grad for t in tensors if t is not None])]


def _draw(n, features, classes, dtype, ignored=0, seed=0) -> Any:
    torch.manual_seed(seed)
    target = torch.randint(0, classes, (n,))
    target[torch.randperm(n)[:ignored]] = -100
    x, weight, bias = (
        torch.randn(n, features),
        torch.randn(classes, features) / math.sqrt(features),
        torch.randn(classes),
    )
    return [t.to(dtype) for t in (x, weight, bias)], target


def _close(found, expected, dtype):
    rtol, atol = _TOLERANCE[dtype]
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().nan_to_num().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(scale, 1e-3), equal_nan=True)


@examples(8)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 50)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.sampled_from([0, 1, 5, 40]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    extras=st.tuples(st.booleans(), st.booleans()),
    rows=st.sampled_from([None, 1, 7, 16, 1000]),
)
@example((33, 5, 7), torch.float64, "mean", 40, 0.1, (True, True), 8)  # no row counts
@example((0, 5, 7), torch.float64, "mean", 0, 0.0, (True, False), None)
@example((0, 5, 7), torch.float64, "none", 0, 0.0, (True, False), 3)
def test_values_and_gradients(sizes, dtype, reduction, ignored, smoothing, extras, rows) -> None:
    (x, weight, bias), target = _draw(*sizes, dtype=dtype, ignored=min(ignored, sizes[0]), seed=sum(sizes))
    bias = bias if extras[0] else None
    classes = torch.rand(sizes[2]).to(dtype) if extras[1] else None
    options = None if rows is None else LinearCrossEntropyOptions(batch_chunk_size=rows)
    shared = {"reduction": reduction, "label_smoothing": smoothing}

    def on_jax(x, weight, bias):
        counts = None if classes is None else classes.to("jax")
        return F.linear_cross_entropy(
            x, weight, target.to("jax"), linear_bias=bias, weight=counts, options=options, **shared
        )

    def on_cpu(x, weight, bias):
        counts = None if classes is None else classes.double()
        return F.linear_cross_entropy(x, weight, target, linear_bias=bias, weight=counts, **shared)

    found = _values(on_jax, *(None if t is None else t.to("jax") for t in (x, weight, bias)))
    _close(found, _values(on_cpu, *(None if t is None else t.double() for t in (x, weight, bias))), dtype)


def test_no_value_has_as_many_elements_as_the_logits(monkeypatch):
    monkeypatch.setattr(_logits, "_ROWS", 16)
    monkeypatch.setattr(_logits, "_LOGITS", 1)
    monkeypatch.setattr(_logits, "batch_parts", lambda: 1)  # whatever tests before have divided
    (x, weight, bias), target = _draw(100, 8, 300, torch.float32)

    def step(x, weight, bias, target, reduction):
        loss = linear_cross_entropy(x, weight, target, bias, reduction=reduction, label_smoothing=0.1)
        return loss.sum()

    def largest(jaxpr):
        sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
        inner = [largest(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params)]
        return max(sizes + inner)

    arrays = [jnp.asarray(t.numpy()) for t in (x, weight, bias)]
    for reduction in (0, 1):
        gradients = jax.grad(
            lambda x, w, b, r=reduction: step(x, w, b, jnp.asarray(target.numpy()), r), argnums=(0, 1, 2)
        )
        assert largest(jax.make_jaxpr(gradients)(*arrays).jaxpr) < 100 * 300 / 3
    found = jax.jit(gradients)(*arrays)
    expected = _values(
        lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=0.1),
        *(t.double() for t in (x, weight, bias)),
    )[1:]
    _close([torch.from_numpy(np.array(f, np.float64)) for f in found], [e * 2 for e in expected], torch.float32)


def test_only_what_needs_gradients_is_computed():
    (x, weight, _), target = _draw(24, 8, 30, torch.float32)
    arrays, target = [jnp.asarray(t.numpy()) for t in (x, weight)], jnp.asarray(target.numpy())

    def products(argnums):
        gradient = jax.grad(lambda x, w: linear_cross_entropy(x, w, target), argnums=argnums)
        return str(jax.make_jaxpr(gradient)(*arrays)).count("dot_general")

    assert (products(0), products(1), products((0, 1))) == (2, 2, 3)


def test_a_training_step_compiled_and_the_module():
    (x, _, _), target = _draw(20, 8, 31, torch.float32)
    torch.manual_seed(1)
    losses = nn.LinearCrossEntropyLoss(8, 31, options=LinearCrossEntropyOptions(batch_chunk_size=6))
    expected = losses(x, target)
    expected.backward()
    gradients = [p.grad for p in losses.parameters()]
    assert all(g is not None for g in gradients)
    losses.zero_grad()
    losses = losses.to("jax")

    @torchax.compile
    def step(x, target):
        loss = losses(x, target)
        loss.backward()
        return loss.detach()

    for _ in range(2):
        losses.zero_grad()
        torch.testing.assert_close(step(x.to("jax"), target.to("jax")).cpu(), expected.detach(), rtol=1e-5, atol=1e-5)
    for p, g in zip(losses.parameters(), gradients, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.cpu(), g, rtol=1e-4, atol=1e-6)


def test_torch_s_function_is_served_whole():
    (x, weight, _), target = _draw(6, 4, 5, torch.float32)
    loss = F.linear_cross_entropy(x.to("jax").requires_grad_(), weight.to("jax"), target.to("jax"))
    assert "Whole" in str(loss.grad_fn)
    loss = F.linear_cross_entropy(x.requires_grad_(), weight, target)
    assert loss.device.type == "cpu" and "NllLoss" in str(loss.grad_fn)


def test_one_row_and_inference():
    (x, weight, bias), target = _draw(3, 8, 31, torch.float32)
    for reduction in ("mean", "none"):
        with torch.inference_mode():
            found = F.linear_cross_entropy(
                x[0].to("jax"), weight.to("jax"), target[0].to("jax"), linear_bias=bias.to("jax"), reduction=reduction
            )
        expected = F.linear_cross_entropy(x[0], weight, target[0], linear_bias=bias, reduction=reduction)
        assert found.shape == ()
        torch.testing.assert_close(found.cpu(), expected)


def test_gradients_of_gradients_and_transforms():
    (x, weight, _), target = _draw(6, 4, 5, torch.float64)

    def twice(x: Any, weight: Any, target: Any) -> Any:
        weight = weight.requires_grad_()
        loss = F.linear_cross_entropy(x, weight, target)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        gradient.square().sum().backward()
        return weight.grad

    expected = twice(x, weight.clone(), target)
    found = twice(x.to("jax"), weight.to("jax"), target.to("jax"))
    torch.testing.assert_close(found.cpu(), expected)

    def per_row(x, weight, target):
        return torch.func.vmap(torch.func.grad(F.linear_cross_entropy), (0, None, 0))(x, weight, target)

    torch.testing.assert_close(
        per_row(*(t.to("jax") for t in (x, weight, target))).cpu(), per_row(x, weight.detach(), target)
    )


def test_autocast_computes_the_loss_in_float32():
    (x, weight, _), target = _draw(20, 8, 31, torch.float32)
    with torch.autocast("jax", torch.bfloat16):
        found = F.linear_cross_entropy(x.to("jax"), weight.to("jax"), target.to("jax"))
    expected = F.linear_cross_entropy(x.bfloat16().double(), weight.bfloat16().double(), target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_other_targets_go_through_torch_s_parts():
    (x, weight, _), _ = _draw(6, 4, 5, torch.float32)
    shares = torch.rand(6, 5).softmax(-1)
    found = F.linear_cross_entropy(x.to("jax"), weight.to("jax"), shares.to("jax"))
    torch.testing.assert_close(found.cpu(), F.linear_cross_entropy(x, weight, shares))
    deep, target = torch.randn(5, 3, 4), torch.randint(0, 5, (6, 3))
    found = F.linear_cross_entropy(x.to("jax"), deep.to("jax"), target.to("jax"))
    torch.testing.assert_close(found.cpu(), F.linear_cross_entropy(x, deep, target))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(target=torch.full((6,), 5)),
        lambda c: c.update(target=torch.full((6,), -1)),
        lambda c: c.update(target=c["target"][:5]),
        lambda c: c.update(target=c["target"].int()),
        lambda c: c.update(linear_weight=torch.randn(5, 3)),
        lambda c: c.update(linear_bias=torch.randn(4)),
        lambda c: c.update(weight=torch.randn(4)),
        lambda c: c.update(reduction="median"),
        lambda c: c.update(label_smoothing=1.5),
        lambda c: c.update(input=torch.randn(2, 6, 4)),
        lambda c: c.update(linear_weight=c["linear_weight"].double()),
    ],
)
def test_refused_as_on_cpu(change):
    (x, weight, _), target = _draw(6, 4, 5, torch.float32)
    call: dict[str, Any] = {"input": x, "linear_weight": weight, "target": target}
    change(call)
    with pytest.raises(Exception) as on_cpu:
        F.linear_cross_entropy(**call)
    with pytest.raises(on_cpu.type):
        ours: dict[str, Any] = {k: v.to("jax") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        F.linear_cross_entropy(**ours).tolist()


def test_rows_that_are_divided_over_devices(jax_devices, monkeypatch):
    monkeypatch.setattr(_logits, "_ROWS", 8)
    monkeypatch.setattr(_logits, "_LOGITS", 1)
    monkeypatch.setattr(torchax._sharding.pins, "epoch", 1)
    monkeypatch.setattr(torchax._sharding.pins, "parts", 2)
    (x, weight, _), target = _draw(50, 8, 30, torch.float32, ignored=3)
    expected = _values(lambda x, w, _: F.linear_cross_entropy(x, w, target, reduction="none"), x, weight, None)
    mesh = jax.sharding.Mesh(np.array(jax_devices[:2]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = [jax.device_put(jnp.asarray(t.numpy()), s) for t, s in ((x, split), (weight, whole), (target, split))]

    @jax.jit
    def train(x, weight, target):
        each, pull = jax.vjp(lambda x, w: linear_cross_entropy(x, w, target, reduction=0), x, weight)
        return each, *pull(jnp.linspace(0.5, 2, 50, dtype=jnp.float32))

    found = train(*arrays)
    _close([torch.from_numpy(np.array(f, np.float64)) for f in found], expected, torch.float32)


# Compiled by the TPU compiler --------------------------------------------------------------------------------------


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("full_effort")
def test_memory_of_a_vocabulary_on_tpu():
    """8,192 tokens, 4,096 features, 128,256 classes, bfloat16, forward and backward."""
    pytest.importorskip("libtpu")
    from torchax.interop import aot_compile

    with torch.device("meta"):
        x, weight = (torch.empty(*s, dtype=torch.bfloat16) for s in ((8192, 4096), (128256, 4096)))
        target = torch.empty(8192, dtype=torch.int64)

    def train(loss_of, x, weight, target):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        return torch.autograd.grad(loss_of(x, weight, target), (x, weight))

    def compiled(loss_of: Any) -> int:
        found = aot_compile(lambda *a: train(loss_of, *a), (x, weight, target), "v5e:2x2", mesh={"data": 1})
        assert found.temporary_bytes is not None
        return found.temporary_bytes

    plain = compiled(lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target))
    ours = compiled(F.linear_cross_entropy)
    print(f"temporary MiB: plain {plain / 2**20:.0f}, linear_cross_entropy {ours / 2**20:.0f}")
    assert ours < 700 * 2**20 < 0.4 * plain
