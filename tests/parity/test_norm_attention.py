"""Normalization, attention and recurrent layers against CPU torch: values, statistics and gradients."""

import copy

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torchax_ops_aten.attention import scaled_dot_product_attention

few = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def first(out):
    return out if isinstance(out, torch.Tensor) else first(out[0])


def compare(fn, *inputs, rtol=1e-4, atol=1e-4):
    """`fn` on CPU and on the device: the same results, and the same gradients of every input."""
    here = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    there = [t.detach().to("jax").requires_grad_(t.requires_grad) for t in here]
    expected, found = fn(*here), fn(*there)
    expected, found = ([o] if isinstance(o, torch.Tensor) else list(o) for o in (expected, found))
    for e, f in zip(expected, found, strict=True):
        assert f.dtype == e.dtype and f.shape == e.shape
        torch.testing.assert_close(f.detach().cpu(), e.detach(), rtol=rtol, atol=atol, equal_nan=True)
    cotangent = torch.randn(expected[0].shape).to(expected[0].dtype)
    expected[0].backward(cotangent)
    found[0].backward(cotangent.to("jax"))
    for e, f in zip(here, there, strict=True):
        if e.grad is not None:
            torch.testing.assert_close(f.grad.cpu(), e.grad, rtol=rtol, atol=10 * atol)


def compare_module(module, *inputs, tolerance=1e-4):
    """A module on CPU and its copy on the device: results, gradients of parameters, buffers."""
    twin = copy.deepcopy(module).to("jax")
    expected, found = first(module(*inputs)), first(twin(*(x.to("jax") for x in inputs)))
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)
    if expected.requires_grad:
        cotangent = torch.randn(expected.shape)
        expected.backward(cotangent)
        found.backward(cotangent.to("jax"))
    for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None, name
            torch.testing.assert_close(
                b.grad.cpu(), a.grad, rtol=tolerance, atol=10 * tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )
    for (name, a), b in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@few
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_layer_and_rms_norm(shape, over, affine, dtype):
    over = min(over, len(shape))
    normalized = shape[-over:]
    x = torch.randn(3, *shape).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    rest = [torch.randn(normalized).to(dtype), torch.randn(normalized).to(dtype)] if affine else []
    compare(lambda x, w=None, b=None: F.layer_norm(x, normalized, w, b), x, *rest, rtol=tolerance, atol=tolerance)
    compare(lambda x, w=None: F.rms_norm(x, normalized, w), x, *rest[:1], rtol=tolerance, atol=tolerance)


@few
@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 4), max_size=2), st.booleans())
def test_group_norm(groups, each, spatial, affine):
    channels = groups * each
    rest = [torch.randn(channels), torch.randn(channels)] if affine else []
    # a group of one element has a gradient of cancelled rounding errors only
    compare(
        lambda x, w=None, b=None: F.group_norm(x, groups, w, b, eps=1e-2), torch.randn(2, channels, *spatial), *rest
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_batch_norm(rank, options, train):
    module = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](3, **options).train(train)
    x = torch.randn(4, 3, *[2] * rank)
    compare_module(module, x)
    compare(lambda x: F.batch_norm(x, None, None, training=True), x)


def test_batch_norm_of_bfloat16_keeps_float32_statistics():
    mean, var = torch.zeros(3), torch.ones(3)
    there = mean.to("jax"), var.to("jax")
    x = torch.randn(8, 3, 4).bfloat16()
    w, b = torch.rand(3), torch.rand(3)
    expected = F.batch_norm(x, mean, var, w, b, True)
    found = F.batch_norm(x.to("jax"), *there, w.to("jax"), b.to("jax"), True)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(there[0].cpu(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there[1].cpu(), var, rtol=1e-3, atol=1e-3)


def test_instance_norm_and_weight_norm():
    compare_module(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), torch.randn(2, 3, 4, 5))
    compare_module(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(2, 4))


@st.composite
def attentions(draw):
    key_heads = draw(st.integers(1, 2))
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": key_heads * draw(st.integers(1, 2)),
        "key_heads": key_heads,
        "length": draw(st.integers(1, 5)),
        "keys": draw(st.integers(1, 6)),
        "features": draw(st.integers(1, 4)),
        "width": draw(st.integers(1, 4)),
        "mask": draw(st.sampled_from([None, "bool", "float", "batches", "causal"])),
        "scale": draw(st.sampled_from([None, 0.3])),
    }


@few
@given(attentions())
def test_attention(c):
    q = torch.randn(c["batch"], c["heads"], c["length"], c["features"])
    k = torch.randn(c["batch"], c["key_heads"], c["keys"], c["features"])
    v = torch.randn(c["batch"], c["key_heads"], c["keys"], c["width"])
    masks = {
        "bool": torch.rand(c["length"], c["keys"]) > 0.5,
        "float": torch.randn(c["heads"], c["length"], c["keys"]),
        "batches": torch.rand(c["batch"], 1, c["length"], c["keys"]) > 0.5,
    }
    mask = [masks[c["mask"]]] if c["mask"] in masks else []
    options = {"is_causal": c["mask"] == "causal", "scale": c["scale"], "enable_gqa": c["heads"] != c["key_heads"]}
    compare(lambda q, k, v, m=None: F.scaled_dot_product_attention(q, k, v, m, **options), q, k, v, *mask)


def test_heads_that_share_a_key_head_do_not_repeat_it():
    q, k = jnp.ones((1, 6, 4, 3)), jnp.ones((1, 2, 5, 3))
    attend = lambda *qkv: scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    gradients = jax.grad(lambda *qkv: attend(*qkv).sum(), (0, 1, 2))
    for function in (attend, gradients):
        assert "[1,6,5,3]" not in str(jax.make_jaxpr(function)(q, k, k))


def test_rows_masked_everywhere_give_zeros():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    compare(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        torch.randn(2, 4),
        torch.randn(3, 4),
        torch.randn(3, 4),
        mask,
    )


def test_attention_in_bfloat16():
    q, k, v = (torch.randn(1, 2, 8, 16).bfloat16() for _ in range(3))
    compare(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), q, k, v, rtol=5e-2, atol=5e-2)


def test_attention_dropout_keeps_the_mean():
    q, k, v = (torch.ones(1, 1, 64, 8, device="jax") for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(out, torch.ones_like(out)) and abs(out.mean().item() - 1) < 0.1


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_transformer_encoder(mode):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(mode == "train")
    grad = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with grad():
        compare_module(module, x)
        twin = copy.deepcopy(module).to("jax")
        found = twin(x.to("jax"), src_key_padding_mask=padding.to("jax")).cpu()
        torch.testing.assert_close(found, module(x, src_key_padding_mask=padding), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_multihead_attention(need_weights, grad):
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    twin = copy.deepcopy(module).to("jax")
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad):
        expected = module(x, x, x, need_weights=need_weights)
        found = twin(*[x.to("jax")] * 3, need_weights=need_weights)
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-4, atol=1e-4)
    if need_weights:
        torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}, {"bias": False}])
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(make, options):
    compare_module(make(3, 4, num_layers=2, **options), torch.randn(5, 2, 3))


def test_lstm_with_projection_and_relu_rnn():
    compare_module(nn.LSTM(3, 4, proj_size=2), torch.randn(5, 2, 3))
    compare_module(nn.RNN(3, 4, nonlinearity="relu"), torch.randn(5, 3))


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(make):
    compare_module(make(3, 4), torch.randn(2, 3))


def test_lstm_with_dropout_draws_new_masks():
    module = nn.LSTM(3, 4, num_layers=2, dropout=0.5).to("jax")
    x = torch.randn(5, 2, 3, device="jax")
    assert not torch.equal(module(x)[0], module(x)[0])
