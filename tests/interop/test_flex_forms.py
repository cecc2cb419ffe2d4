"""Which score and mask functions of `flex_attention` are recognised, and as what."""

from __future__ import annotations

import pytest
import torch
import torchax  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import _identity, and_masks, noop_mask, or_masks
from torchax_interop._flex_forms import Form, known_form

_W = 7


def _causal(b, h, q, k):
    return q >= k


@pytest.mark.parametrize(
    ("mask", "left", "right"),
    [
        (noop_mask, None, None),
        (_causal, None, 0),
        (lambda b, h, q, k: k < q, None, -1),
        (lambda b, h, q, k: q - k < _W, _W - 1, None),
        (and_masks(_causal, lambda b, h, q, k: q - k <= _W), _W, 0),
        (lambda b, h, q, k: (k <= q) & (k > q - _W), _W - 1, 0),
        (lambda b, h, q, k: (q - k).abs() < _W, _W - 1, _W - 1),
        (lambda b, h, q, k: torch.abs(k - q) <= _W, _W, _W),
        (lambda b, h, q, k: torch.logical_and(3 - q + k >= 0, q + 2 > k), 3, 1),
        (lambda b, h, q, k: 5 >= q - k, 5, None),  # noqa: SIM300
        (lambda b, h, q, k: -q <= 2 - k, None, 2),
    ],
)
def test_bands(mask, left, right):
    assert known_form(_identity, mask) == Form(1.0, None, left, right)
    expected = torch.tensor(
        [[bool(mask(torch.tensor(0), None, q, k)) for k in torch.arange(20)] for q in torch.arange(20)]
    )
    distance = torch.arange(20)[:, None] - torch.arange(20)
    seen = torch.ones(20, 20, dtype=torch.bool)
    seen &= True if left is None else distance <= left
    seen &= True if right is None else -right <= distance
    assert torch.equal(seen, expected)


@given(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from(["<", "<=", ">", ">="]), st.booleans())
def test_any_bound_is_what_it_says(a, b, sign, swapped):
    source = f"q + {a} {sign} k + ({b})" if not swapped else f"k + ({b}) {sign} q + {a}"
    mask = eval(f"lambda b, h, q, k: {source}")
    form = known_form(_identity, mask)
    for d in range(-20, 21):
        seen = (form.left is None or d <= form.left) and (form.right is None or -form.right <= d)
        assert seen == mask(0, 0, d, 0)


@pytest.mark.parametrize(
    ("score", "factor", "cap"),
    [
        (_identity, 1.0, None),
        (lambda s, b, h, q, k: s * 0.5, 0.5, None),
        (lambda s, b, h, q, k: 20 * torch.tanh(s / 20), 1.0, 20.0),
        (lambda s, b, h, q, k: torch.tanh(s * 0.25) * 4.0, 1.0, 4.0),
        (lambda s, b, h, q, k: 3 * (s * 2 / 6).tanh(), 1.0, 3.0),
        (lambda s, b, h, q, k: 8 * torch.tanh(s / 2), 4.0, 8.0),
    ],
)
def test_caps(score, factor, cap):
    form = known_form(score, _causal)
    assert form is not None and (form.factor, form.soft_cap) == pytest.approx((factor, cap))


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, k: q == k,
        lambda b, h, q, k: (q >= k) & (h < 1),
        lambda b, h, q, k: q // 4 == k // 4,
        lambda b, h, q, k: 2 * q >= k,
        lambda b, h, q, k: q + k > 3,
        lambda b, h, q, k: q > 3,
        lambda b, h, q, k: ~(q >= k),
        or_masks(_causal, lambda b, h, q, k: k < 4),
        lambda b, h, q, k: torch.tensor([0, 0, 1])[q] == 0,
        lambda b, h, q, k: torch.tensor([1], device="jax")[q] == 1,
        lambda b, h, q, k: q >= k if q > 2 else k >= q,
        lambda b, h, q, k: 1 / 0,
    ],
)
def test_masks_of_no_known_form(mask):
    assert known_form(_identity, mask) is None


@pytest.mark.parametrize(
    "score",
    [
        lambda s, b, h, q, k: s + (q - k),
        lambda s, b, h, q, k: s * h,
        lambda s, b, h, q, k: torch.tanh(torch.tanh(s)),
        lambda s, b, h, q, k: 5 * torch.tanh(s / 5) + 1,
        lambda s, b, h, q, k: -s,
        lambda s, b, h, q, k: s * s,
        lambda s, b, h, q, k: torch.where(q == 5000, 0.0, s),
        lambda s, b, h, q, k: s * torch.tensor(2.0),
        lambda s, b, h, q, k: 7.0,
    ],
)
def test_scores_of_no_known_form(score):
    assert known_form(score, _causal) is None
