"""``torch.autocast("jax")`` and `torch.amp.GradScaler`."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

F = torch.nn.functional
ones = lambda *shape, dtype=torch.float32: torch.ones(shape, dtype=dtype, device="jax")

LOWER = {
    "mm": lambda x, w: x @ w,
    "linear": lambda x, w: F.linear(x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None]),
    "addmm": lambda x, w: torch.addmm(x, x, w),
    "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, w),
    "conv1d": lambda x, w: F.conv1d(x[None], w[:, :, None]),
    "conv2d": lambda x, w: F.conv2d(x[None, :, :, None], w[:, :, None, None]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None, None], w[None, None], w[None, None]),
}
FLOAT32 = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "exp": torch.exp,
    "sum": torch.sum,
    "sum of dims": lambda x: x.sum(0),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "mse": lambda x: F.mse_loss(x, x),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(len(x), dtype=torch.int64, device=x.device)),
    "bce with logits": lambda x: F.binary_cross_entropy_with_logits(x, x),
    "pow": lambda x: x**2,
    "norm": lambda x: x.norm(),
    "cumsum": lambda x: x.cumsum(0),
}
KEEPS = {
    "add": lambda x: x + x,
    "relu": torch.relu,
    "view": lambda x: x.view(-1),
    "max": torch.amax,
    "gelu": F.gelu,
    "neg": torch.neg,
}


@pytest.mark.parametrize("name", LOWER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrix_ops_run_in_the_low_precision(name, dtype):
    x, w = ones(4, 4), ones(4, 4)
    with torch.autocast("jax", dtype=dtype):
        assert LOWER[name](x, w).dtype == dtype
        assert LOWER[name](x.to(dtype), w).dtype == dtype, "operands of mixed precision meet"
    assert LOWER[name](x, w).dtype == torch.float32


@pytest.mark.parametrize("name", FLOAT32)
def test_delicate_ops_run_in_float32(name):
    low = ones(4, 4, dtype=torch.bfloat16)
    with torch.autocast("jax", dtype=torch.bfloat16):
        assert FLOAT32[name](low).dtype == torch.float32
    assert FLOAT32[name](low).dtype == torch.bfloat16


@pytest.mark.parametrize("name", KEEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_other_ops_keep_their_type(name, dtype):
    with torch.autocast("jax"):
        assert KEEPS[name](ones(4, 4, dtype=dtype)).dtype == dtype


def test_widest_type():
    a, b = ones(3, dtype=torch.bfloat16), ones(3)
    with torch.autocast("jax", dtype=torch.bfloat16):
        assert torch.cat([a, b]).dtype == torch.float32 and torch.stack([a, a]).dtype == torch.bfloat16
        assert torch.addcmul(a, a, b).dtype == torch.float32 and torch.atan2(b, a).dtype == torch.float32


def test_doubles_and_integers_are_left_alone():
    with torch.autocast("jax"):
        assert (ones(2, 2, dtype=torch.float64) @ ones(2, 2, dtype=torch.float64)).dtype == torch.float64
        assert (ones(2, 2, dtype=torch.int64) @ ones(2, 2, dtype=torch.int64)).dtype == torch.int64
        assert ones(2, dtype=torch.int64).sum().dtype == torch.int64
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32, "CPU tensors have an autocast of their own"


def test_nesting_and_state():
    x = ones(2, 2)
    assert not torch.is_autocast_enabled("jax")
    with torch.autocast("jax"):
        assert torch.is_autocast_enabled("jax") and (x @ x).dtype == torch.bfloat16 == torch.get_autocast_dtype("jax")
        with torch.autocast("jax", enabled=False):
            assert (x @ x).dtype == torch.float32
            with torch.autocast("jax", dtype=torch.float16):
                assert (x @ x).dtype == torch.float16
        assert (x @ x).dtype == torch.bfloat16
        with pytest.raises(ZeroDivisionError), torch.autocast("jax", dtype=torch.float16):
            raise ZeroDivisionError
        assert (x @ x).dtype == torch.bfloat16
    assert (x @ x).dtype == torch.float32 and not torch.is_autocast_enabled("jax")

    @torch.autocast("jax", dtype=torch.bfloat16)
    def f(a):
        return a @ a

    assert f(x).dtype == torch.bfloat16
    with torch.amp.autocast("jax", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


def test_unsupported_types_are_refused():
    with pytest.warns(UserWarning), torch.autocast("jax", dtype=torch.float64):
        assert (ones(2, 2) @ ones(2, 2)).dtype == torch.float32
    with torch.autocast("jax"), pytest.raises(RuntimeError, match="unsafe to autocast"):
        F.binary_cross_entropy(ones(2, dtype=torch.bfloat16) / 2, ones(2, dtype=torch.bfloat16))


def test_gradients_keep_the_parameters_type():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)).to("jax")
    x = torch.linspace(-1, 1, 12).reshape(3, 4).to("jax")
    with torch.autocast("jax", dtype=torch.bfloat16):
        out = m(x)
        loss = F.cross_entropy(out, torch.tensor([0, 1, 1], device="jax"))
    assert out.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in m.parameters())
    low = [p.grad.cpu() for p in m.parameters()]
    m.zero_grad()
    F.cross_entropy(m(x), torch.tensor([0, 1, 1], device="jax")).backward()
    for g, p in zip(low, m.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad.cpu(), rtol=0.1, atol=0.02)


def test_inference_mode_and_no_grad():
    m, x = nn.Linear(2, 2).to("jax"), ones(1, 2)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), torch.autocast("jax"):
            assert m(x).dtype == torch.bfloat16
            assert F.layer_norm(m(x), (2,)).dtype == torch.float32


def test_custom_functions():
    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="jax", cast_inputs=torch.float32)
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            assert a.dtype == torch.float32 and not torch.is_autocast_enabled("jax")
            return a @ b

        @staticmethod
        @torch.amp.custom_bwd(device_type="jax")
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            return g @ b.t(), a.t() @ g

    a = ones(2, 2).requires_grad_()
    with torch.autocast("jax"):
        out = Product.apply(a.bfloat16(), a)
    out.sum().backward()
    assert out.dtype == torch.float32 and a.grad is not None


# GradScaler -------------------------------------------------------------------------------------------------------


def test_grad_scaler_steps_as_without_it():
    results = []
    for enabled in (True, False):
        torch.manual_seed(0)
        m = nn.Linear(3, 1).to("jax")
        opt = torch.optim.SGD(m.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("jax", init_scale=2.0**10, growth_interval=2, enabled=enabled)
        for _ in range(3):
            opt.zero_grad()
            loss = m(ones(4, 3)).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
        results.append(m.weight.tolist())
        if enabled:
            assert scaler.get_scale() == 2.0**11 and scaler.state_dict()["scale"] == 2.0**11
    assert results[0] == [pytest.approx(row, rel=1e-5) for row in results[1]]


def test_grad_scaler_skips_steps_with_infinite_gradients():
    m = nn.Linear(2, 1).to("jax")
    opt = torch.optim.Adam(m.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("jax", init_scale=4.0)
    before = m.weight.tolist()
    scaler.scale(m(ones(1, 2) * float("inf")).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert m.weight.tolist() == before and scaler.get_scale() == 2.0
    fresh = torch.amp.GradScaler("jax")
    fresh.load_state_dict(scaler.state_dict())
    assert fresh.get_scale() == 2.0


def _in_a_thread(fn):
    results = []
    thread = threading.Thread(target=lambda: results.append(fn()))
    thread.start()
    thread.join()
    return results[0]


def test_every_thread_starts_with_the_same_dtype():
    def run():
        with torch.autocast("jax"):
            return torch.get_autocast_dtype("jax"), torch.mm(ones(2, 2), ones(2, 2)).dtype

    def switched():
        torch.set_autocast_enabled("jax", True)
        return torch.mm(ones(2, 2), ones(2, 2)).dtype

    assert run() == _in_a_thread(run) == (torch.bfloat16, torch.bfloat16)
    assert _in_a_thread(switched) == torch.bfloat16
    assert _in_a_thread(lambda: torch.get_autocast_dtype("cpu")) == torch.get_autocast_dtype("cpu")


def test_a_thread_may_set_another_dtype():
    def run():
        torch.set_autocast_dtype("jax", torch.float16)
        with torch.autocast("jax"):
            inside = torch.mm(ones(2, 2), ones(2, 2)).dtype
        with torch.autocast("jax", dtype=torch.bfloat16):
            pass
        return torch.get_autocast_dtype("jax"), inside

    assert _in_a_thread(run) == (torch.float16, torch.float16)
    assert torch.get_autocast_dtype("jax") == torch.bfloat16
