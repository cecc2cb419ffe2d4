"""Convolution and pooling against CPU torch: values, indices and gradients, over arguments drawn at random."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torchax_ops_aten.conv import convolution

from helpers import examples

few = settings(examples(12), suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def compare(fn, *inputs, rtol=1e-4, atol=1e-4):
    """`fn` on CPU and on the device: the same results, and the same gradients of every input."""
    here = [t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()) for t in inputs]
    there = [t.detach().to("jax").requires_grad_(t.requires_grad) for t in here]
    expected, found = fn(*here), fn(*there)
    expected, found = ([o] if isinstance(o, torch.Tensor) else list(o) for o in (expected, found))
    for e, f in zip(expected, found, strict=True):
        assert f.dtype == e.dtype and f.shape == e.shape
        torch.testing.assert_close(f.detach().cpu(), e.detach(), rtol=rtol, atol=atol, equal_nan=True)
    if not expected[0].requires_grad or not expected[0].numel():
        return
    cotangent = torch.randn(expected[0].shape, dtype=expected[0].dtype)
    expected[0].backward(cotangent)
    found[0].backward(cotangent.to("jax"))
    for e, f in zip(here, there, strict=True):
        if e.grad is not None:
            torch.testing.assert_close(f.grad.cpu(), e.grad, rtol=rtol, atol=10 * atol)


def numbers(rank, low, high):
    return st.tuples(*[st.integers(low, high)] * rank)


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    return {
        "rank": rank,
        "groups": groups,
        "batch": draw(st.integers(0, 3)),
        "channels": groups * draw(st.integers(1, 2)),
        "out": groups * draw(st.integers(1, 2)),
        "size": draw(numbers(rank, 1, 8)),
        "kernel": draw(numbers(rank, 1, 3)),
        "stride": draw(numbers(rank, 1, 3)),
        "padding": draw(numbers(rank, 0, 2)),
        "dilation": draw(numbers(rank, 1, 2)),
        "bias": draw(st.booleans()),
    }


@few
@given(convolutions())
def test_convolution(c):
    fits = all(
        n + 2 * p >= d * (k - 1) + 1
        for n, p, d, k in zip(c["size"], c["padding"], c["dilation"], c["kernel"], strict=True)
    )
    assume(fits)
    conv = (F.conv1d, F.conv2d, F.conv3d)[c["rank"] - 1]
    x = torch.randn(c["batch"], c["channels"], *c["size"])
    w = torch.randn(c["out"], c["channels"] // c["groups"], *c["kernel"])
    rest = [torch.randn(c["out"])] if c["bias"] else []
    compare(lambda x, w, b=None: conv(x, w, b, c["stride"], c["padding"], c["dilation"], c["groups"]), x, w, *rest)


@few
@given(convolutions(), st.data())
def test_transposed_convolution(c, data):
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(c["stride"], c["dilation"], strict=True))
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(
            c["size"], c["stride"], c["padding"], c["dilation"], c["kernel"], extra, strict=True
        )
    ]
    assume(min(sizes) > 0 and c["batch"] > 0)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[c["rank"] - 1]
    x = torch.randn(c["batch"], c["channels"], *c["size"])
    w = torch.randn(c["channels"], c["out"] // c["groups"], *c["kernel"])
    rest = [torch.randn(c["out"])] if c["bias"] else []
    compare(
        lambda x, w, b=None: conv(x, w, b, c["stride"], c["padding"], extra, c["groups"], c["dilation"]), x, w, *rest
    )


@few
@given(convolutions(), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.complex64, torch.int64]))
def test_transposed_convolution_whose_windows_touch(c, dtype):
    assume(c["batch"] > 0)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[c["rank"] - 1]
    shapes = (
        (c["batch"], c["channels"], *c["size"]),
        (c["channels"], c["out"] // c["groups"], *c["kernel"]),
        (c["out"],),
    )
    draw = (lambda s: torch.randint(-5, 5, s)) if dtype is torch.int64 else lambda s: torch.randn(s, dtype=dtype)
    x, w, *rest = (draw(s) for s in (shapes if c["bias"] else shapes[:2]))
    tolerance = 2e-2 if dtype is torch.float16 else 1e-4
    compare(
        lambda x, w, b=None: conv(x, w, b, c["kernel"], groups=c["groups"]), x, w, *rest, rtol=tolerance, atol=tolerance
    )


def test_windows_that_touch_are_a_matrix_product():
    def primitives(stride):
        call = lambda x, w: convolution(x, w, None, (stride,), (0,), (1,), True, (0,), 1)
        return str(jax.make_jaxpr(call)(jnp.ones((1, 4, 5)), jnp.ones((4, 3, 2))))

    assert "dot_general" in primitives(2) and "conv_general_dilated" not in primitives(2)
    assert "conv_general_dilated" in primitives(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_dtypes(dtype, transposed):
    if dtype is torch.int64:
        x, w = torch.randint(-5, 5, (2, 4, 7, 6)), torch.randint(-5, 5, (4, 4, 3, 2))
    else:
        x, w = torch.randn(2, 4, 7, 6, dtype=dtype), torch.randn(4, 4, 3, 2, dtype=dtype)
    tolerance = 1e-1 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    conv = F.conv_transpose2d if transposed else F.conv2d
    compare(lambda x, w: conv(x, w, stride=2, padding=1), x, w, rtol=tolerance, atol=tolerance)


def test_depthwise_and_same_padding():
    compare(lambda x, w: F.conv1d(x, w, padding="same", groups=6), torch.randn(2, 6, 9), torch.randn(6, 1, 4))


@st.composite
def windows(draw):
    rank = draw(st.integers(1, 3))
    kernel = draw(numbers(rank, 1, 4 if rank < 3 else 3))
    return {
        "rank": rank,
        "kernel": kernel,
        "stride": draw(numbers(rank, 1, 3)),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "dilation": draw(numbers(rank, 1, 2)),
        "size": draw(numbers(rank, 3, 9)),
        "ceil_mode": draw(st.booleans()),
        "batched": draw(st.booleans()),
    }


def image(c, values="normal"):
    shape = (*((2,) if c["batched"] else ()), 3, *c["size"])
    # few distinct values, so that maxima are tied
    return torch.randn(shape) if values == "normal" else torch.randint(-2, 3, shape).float()


@few
@given(windows(), st.sampled_from(["normal", "ties"]))
def test_max_pool(c, values):
    assume(
        all(
            n + 2 * p >= d * (k - 1) + 1
            for n, p, d, k in zip(c["size"], c["padding"], c["dilation"], c["kernel"], strict=True)
        )
    )
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[c["rank"] - 1]
    x = image(c, values)
    compare(
        lambda x: pool(x, c["kernel"], c["stride"], c["padding"], c["dilation"], c["ceil_mode"], return_indices=True), x
    )


def test_max_pool_takes_the_last_nan_and_the_first_maximum():
    x = torch.tensor([[[[1.0, float("nan"), 2.0, float("nan")], [3.0, 3.0, 3.0, 3.0]]]])
    compare(lambda x: F.max_pool2d(x, 2, return_indices=True), x)
    compare(lambda x: F.adaptive_max_pool2d(x, (1, 3), return_indices=True), x)


def test_max_pool_of_large_windows():
    compare(lambda x: F.max_pool2d(x, 7, 3, 3, return_indices=True), torch.randint(-3, 4, (2, 3, 12, 11)).float())


@few
@given(windows(), st.booleans(), st.sampled_from([None, 3]))
def test_avg_pool(c, count_include_pad, divisor):
    assume(all(n + 2 * p >= k for n, p, k in zip(c["size"], c["padding"], c["kernel"], strict=True)))
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[c["rank"] - 1]
    rest = [] if c["rank"] == 1 else [divisor]
    compare(
        lambda x: pool(x, c["kernel"], c["stride"], c["padding"], c["ceil_mode"], count_include_pad, *rest), image(c)
    )


@few
@given(st.integers(1, 3), st.data())
def test_adaptive_pools(rank, data):
    size, out = data.draw(numbers(rank, 1, 9)), data.draw(numbers(rank, 1, 5))
    average = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[rank - 1]
    maximum = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[rank - 1]
    x = torch.randn(2, 3, *size)
    compare(lambda x: average(x, out), x)
    compare(lambda x: maximum(x, out, return_indices=True), x)


@few
@given(
    st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic"]),
    numbers(2, 1, 7),
    numbers(2, 1, 9),
    st.booleans(),
    st.booleans(),
)
def test_interpolate(mode, size, out, align, antialias):
    options = {} if mode.startswith("nearest") else {"align_corners": align, "antialias": antialias}
    compare(lambda x: F.interpolate(x, out, mode=mode, **options), torch.randn(1, 2, *size))
