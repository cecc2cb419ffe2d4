"""flex_attention against torch's own mathematical definition of it on CPU."""

import math

import pytest
import torch
import torchax
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

_LN2 = math.log(2.0)


def _causal(b, h, q, k):
    return q >= k


def _window(b, h, q, k):
    return (q >= k) & (q - k < 20)


def _soft_cap(score, b, h, q, k):
    return 3.0 * torch.tanh(score / 3.0)


def _distance(score, b, h, q, k):
    return score - 0.1 * (h + 1) * (q - k).abs()


def _inputs(heads=4, key_heads=4, lengths=(48, 80), features=16, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(2, heads, lengths[0]), (2, key_heads, lengths[1]), (2, key_heads, lengths[1])]
    return [torch.randn(*s, features, dtype=dtype) for s in shapes]


def _reference(q, k, v, score_mod, mask_mod, scale):
    score_mod = score_mod or (lambda score, *_: score)
    mask = create_block_mask(mask_mod or (lambda b, h, q, k: q >= 0), None, None, q.shape[2], k.shape[2], device="cpu")
    out, lse, top = math_attention(q, k, v, score_mod, mask.as_tuple(), scale or q.shape[-1] ** -0.5, {})
    return out, lse * _LN2, top * _LN2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("score_mod", "mask_mod", "key_heads", "scale"),
    [
        (None, None, 4, None),
        (None, _causal, 4, 0.3),
        (_soft_cap, _window, 2, None),
        (_distance, _causal, 1, None),
    ],
)
def test_values_and_gradients(score_mod, mask_mod, key_heads, scale, compiled):
    operands = _inputs(key_heads=key_heads)
    expected_in = [t.clone().requires_grad_() for t in operands]
    expected, *stats = _reference(*expected_in, score_mod, mask_mod, scale)
    (expected.square().sum() + stats[0].sum()).backward()
    mask = mask_mod and create_block_mask(mask_mod, None, None, 48, 80, device="jax")
    found_in = [t.to("jax").requires_grad_() for t in operands]

    def attend(q, k, v):
        return flex_attention(
            q, k, v, score_mod, mask, scale, enable_gqa=key_heads != 4, return_aux=AuxRequest(lse=True, max_scores=True)
        )

    found, aux = (torchax.compile(attend) if compiled else attend)(*found_in)
    (found.square().sum() + aux.lse.sum()).backward()
    for ours, theirs in zip((found, aux.lse, aux.max_scores), (expected, *stats), strict=True):
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found_in, expected_in, strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_tensors_that_the_functions_close_over():
    operands = _inputs(lengths=(32, 32))
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def run(device):
        table = slopes.to(device).requires_grad_()
        documents = (torch.arange(32) // 12).to(device)
        same = lambda b, h, q, k: documents[q] == documents[k]
        slope = lambda score, b, h, q, k: score - table[h] * (q - k)
        q, k, v = (t.to(device) for t in operands)
        if device == "cpu":
            out = _reference(q, k, v, slope, same, None)[0]
        else:
            out = flex_attention(q, k, v, slope, create_block_mask(same, None, None, 32, 32, device=device))
        out.square().sum().backward()
        return out.detach().cpu(), table.grad.cpu()

    for ours, theirs in zip(run("jax"), run("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_half_precision_and_no_statistics():
    q, k, v = _inputs(dtype=torch.bfloat16)
    found = flex_attention(*(t.to("jax") for t in (q, k, v)), _soft_cap)
    assert found.dtype == torch.bfloat16 and found.shape == q.shape
    torch.testing.assert_close(found.cpu(), _reference(q, k, v, _soft_cap, None, None)[0], rtol=2e-2, atol=2e-2)


def test_bad_input():
    q, k, v = (t.to("jax") for t in _inputs())
    with pytest.raises(ValueError, match="same number of heads"):
        flex_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(RuntimeError, match="same device"):
        flex_attention(q, k, v, block_mask=create_block_mask(_causal, None, None, 48, 80, device="cpu"))
    with pytest.raises(ValueError, match="block_mask was created for"):
        flex_attention(q, k, v, block_mask=create_block_mask(_causal, None, None, 40, 80, device="jax"))
    with pytest.raises((ValueError, RuntimeError), match=r"device|Expected"):
        flex_attention(q, k.cpu(), v)
