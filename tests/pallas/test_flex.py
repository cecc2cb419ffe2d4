"""`flex_attention` in known forms: the kernel's values and gradients, when it is chosen, and what the TPU compiler makes of it."""

from __future__ import annotations

import pytest
import torch
import torchax
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torchax import interop

pytest.importorskip("torchax_ops_pallas")
from torchax_ops_pallas.lowerings import KernelUnavailable


def _window(left, right):
    return lambda b, h, q, k: (q - k <= left) & (k - q <= right)


def _capped(cap):
    return lambda score, b, h, q, k: cap * torch.tanh(score / cap)


def _reference(query, key, value, left, right, cap, scale):
    """In float64: the scores of all pairs."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    return scores.masked_fill((distance > left) | (-distance > right), -torch.inf).softmax(-1) @ value


@settings(max_examples=4)
@given(
    length=st.integers(64, 300),
    more=st.integers(0, 90),
    left=st.integers(0, 200),
    right=st.integers(0, 200),
    cap=st.none() | st.floats(0.5, 10),
    groups=st.sampled_from([1, 2]),
)
def test_values_and_gradients_in_the_interpreter(length, more, left, right, cap, groups):
    torch.manual_seed(length)
    shapes = [(1, 2, length, 32), *[(1, 2 // groups, length + more, 32)] * 2]
    exact = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    expected = _reference(*exact, left, right, cap, 0.3)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    operands = [t.detach().float().to("jax").requires_grad_() for t in exact]
    mask = create_block_mask(_window(left, right), None, None, length, length + more, device="jax")
    score = None if cap is None else _capped(cap)
    with torchax.config.override(pallas="interpret"):
        found = flex_attention(*operands, score_mod=score, block_mask=mask, scale=0.3, enable_gqa=groups > 1)
        grads = torch.autograd.grad((found * weights.float().to("jax")).sum(), operands)
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=1e-4, atol=1e-4)
    for g, e in zip(grads, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        torch.testing.assert_close(g.cpu().double(), e, rtol=1e-3, atol=1e-3)


def _operands(length=128, **options):
    return [torch.randn(1, 2, length, 16, device="jax", **options) for _ in range(3)]


def test_required_and_what_is_not_known():
    operands = _operands()
    mask = create_block_mask(_window(9, 0), None, None, 128, 128, device="jax")
    with torchax.config.override(pallas="required"):
        with pytest.raises(KernelUnavailable, match="platform tpu"):
            flex_attention(*operands, block_mask=mask)
        with pytest.raises(KernelUnavailable, match="too few"):
            flex_attention(*[t[:, :, :32] for t in operands])
        # what is no band goes the plain way, as does a call that asks for statistics
        alibi = flex_attention(*operands, score_mod=lambda s, b, h, q, k: s - (q - k).abs())
        out, aux = flex_attention(*operands, return_aux=AuxRequest(lse=True))
    assert alibi.isfinite().all() and out.isfinite().all() and aux.lse.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "mask"),
    [
        (128, lambda b, h, q, k: q > k),  # the first query sees nothing
        (64, lambda b, h, q, k: q - k < 9),  # the last ones
        (192, lambda b, h, q, k: (k - q >= 5) & (k - q <= 3)),  # none sees anything
    ],
)
def test_queries_that_see_no_key_get_zeros(keys, mask):
    query, (key, value) = _operands()[0], _operands(keys)[1:]
    mask = create_block_mask(mask, None, None, 128, keys, device="jax")
    with torchax.config.override(pallas="interpret"):
        found = flex_attention(query, key, value, block_mask=mask)
    torch.testing.assert_close(found, flex_attention(query, key, value, block_mask=mask))
    assert found.abs().amin((0, 1, 3)).min() == 0


def test_gradients_of_gradients_and_vmap_go_through_the_parts():
    operands = _operands(64, requires_grad=True)
    mask = create_block_mask(_window(9, 0), None, None, 64, 64, device="jax")
    twice = []
    for mode in ("interpret", "off"):
        with torchax.config.override(pallas=mode):
            out = flex_attention(*operands, block_mask=mask)
            (g,) = torch.autograd.grad(out.square().sum(), operands[0], create_graph=True)
            twice.append(torch.autograd.grad(g.square().sum(), operands[1])[0])
    torch.testing.assert_close(*twice, rtol=1e-3, atol=1e-3)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_compiler_holds_no_scores(topology):
    pytest.importorskip("libtpu")
    length = 8192 if topology == "v5e:2x2" else 1024
    mask = create_block_mask(_window(1023, 0), None, None, length, length, device="jax")

    def step(query, key, value):
        out = flex_attention(query, key, value, score_mod=_capped(30.0), block_mask=mask, enable_gqa=True)
        return torch.autograd.grad(out.float().square().mean(), (query, key, value))

    heads = (8, 2, 2)
    operands = [torch.empty(1, n, length, 128, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in heads]
    found = interop.aot_compile(step, tuple(operands), topology, mesh={"data": 1})
    assert sorted(found.kernels.values()) == [1, 1, 1] and all("splash" in name for name in found.kernels)
    assert found.temporary_bytes < 64 * 2**20  # 8 heads' scores of 8,192 tokens take 2 GiB
