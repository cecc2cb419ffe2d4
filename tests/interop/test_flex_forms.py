"""Which score and mask functions of `flex_attention` are recognised, and as what."""

from __future__ import annotations

import pytest
import torch
import torchax  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import _identity, and_masks, noop_mask, or_masks
from torchax_interop import _flex_cache
from torchax_interop._flex_cache import form_of
from torchax_interop._flex_forms import Form, Unknown, known_form

_W = 7
_DOCUMENTS, _OTHERS = torch.arange(8, device="jax") // 3, torch.arange(8, device="jax") // 2
_PER_BATCH = torch.arange(16, device="jax").view(2, 8) // 3


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
        lambda b, h, q, k: k < 4,
        lambda b, h, q, k: (q >= k) & (h < 1),
        lambda b, h, q, k: (q >= k) | (q < 4),
        lambda b, h, q, k: ((q >= k) | (k < 4)) & (q - k < 9),
        lambda b, h, q, k: (q >= k) | (_DOCUMENTS[q] == _DOCUMENTS[k]),
        lambda b, h, q, k: _DOCUMENTS[q] == _DOCUMENTS[q],
        lambda b, h, q, k: _DOCUMENTS[q + 1] == _DOCUMENTS[k],
        lambda b, h, q, k: _DOCUMENTS[q] == _OTHERS[k],
        lambda b, h, q, k: (_DOCUMENTS[q] == _DOCUMENTS[k]) & (_OTHERS[q] == _OTHERS[k]),
        lambda b, h, q, k: (_DOCUMENTS * 1)[q] == (_DOCUMENTS * 1)[k],
        lambda b, h, q, k: _PER_BATCH[h, q] == _PER_BATCH[h, k],
        lambda b, h, q, k: _PER_BATCH[0, q] == _PER_BATCH[0, k],
        lambda b, h, q, k: q // 4 == k // 4,
        lambda b, h, q, k: 2 * q >= k,
        lambda b, h, q, k: q + k > 3,
        lambda b, h, q, k: q > 3,
        lambda b, h, q, k: ~(q >= k),
        lambda b, h, q, k: torch.tensor([0, 0, 1])[q] == 0,
        lambda b, h, q, k: torch.tensor([1], device="jax")[q] == 1,
        lambda b, h, q, k: q >= k if q > 2 else k >= q,
        lambda b, h, q, k: 1 / 0,
    ],
)
def test_masks_of_no_known_form(mask):
    for known in (known_form, form_of):
        with pytest.raises(Unknown, match="the mask is of no known form: "):
            known(_identity, mask)


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
    with pytest.raises(Unknown, match="score_mod is of no known form: "):
        known_form(score, _causal)


@pytest.mark.parametrize(
    ("mask", "right", "prefix"),
    [
        (or_masks(_causal, lambda b, h, q, k: k < 4), 0, 4),
        (lambda b, h, q, k: (k <= q) | (k <= 4), 0, 5),
        (lambda b, h, q, k: torch.logical_or(k < 4, q + 2 >= k) | (k < 6), 2, 6),
        (lambda b, h, q, k: (q >= k) | (k < -3), 0, 0),
    ],
)
def test_prefixes(mask, right, prefix):
    assert form_of(_identity, mask) == Form(1.0, None, None, right, prefix)


def _same(b, h, q, k):
    return _DOCUMENTS[q] == _DOCUMENTS[k]


@pytest.mark.parametrize(
    ("mask", "right", "documents"),
    [
        (_same, None, _DOCUMENTS),
        (and_masks(_causal, _same), 0, _DOCUMENTS),
        (lambda b, h, q, k: (q >= k) & (_OTHERS[k] == _OTHERS[q]), 0, _OTHERS),
        (lambda b, h, q, k: (_PER_BATCH[b, q] == _PER_BATCH[b, k]) & (k <= q), 0, _PER_BATCH),
    ],
)
def test_documents(mask, right, documents, recordings):
    for known, default in ((known_form, "cpu"), (form_of, "jax"), (form_of, "cpu")):
        with torch.device(default):  # "jax" it is in compiled functions
            form = known(_identity, mask)
        assert form.documents is documents and form[:5] == (1.0, None, None, right, 0)


# ---------------------------------------------------------------------- the cache
_LENGTH = 3


@pytest.fixture
def recordings(monkeypatch):
    """How often functions have been recorded."""
    seen = []
    monkeypatch.setattr(_flex_cache, "_forms", {})
    monkeypatch.setattr(_flex_cache, "known_form", lambda *functions: seen.append(functions) or known_form(*functions))
    return seen


def _window(n, table=None):
    def mask(b, h, q, k):
        seen = (q - k < n) & (k <= q)
        return seen if table is None else seen & (table[q] == table[k])

    return mask


def test_functions_of_the_same_code_and_values_are_recorded_once(recordings):
    for _ in range(3):
        assert form_of(_identity, and_masks(_window(5), _causal)).left == 4
    assert len(recordings) == 1
    assert form_of(_identity, and_masks(_window(6), _causal)).left == 5 and len(recordings) == 2


def test_a_global_that_changes_is_seen(recordings, monkeypatch):
    mask = lambda b, h, q, k: q - k <= _LENGTH
    assert form_of(_identity, mask).left == 3
    monkeypatch.setitem(globals(), "_LENGTH", 7)
    assert form_of(_identity, mask).left == 7
    monkeypatch.undo()
    assert len(recordings) == 2


def test_tensors_count_by_shape_and_the_form_has_those_of_the_call(recordings):
    tables = [torch.arange(8, device="jax") // n for n in (2, 3)]
    for table in tables:
        assert form_of(_identity, _window(5, table)).documents is table
    assert len(recordings) == 1
    longer = torch.arange(9, device="jax")
    assert form_of(_identity, _window(5, longer)).documents is longer and len(recordings) == 2


def test_what_hangs_on_values_of_tensors_is_unknown():
    flag = torch.ones((), dtype=torch.bool, device="jax")
    with pytest.raises(Unknown):
        form_of(_identity, lambda b, h, q, k: q >= k if flag else k >= q)


def test_objects_are_looked_at_anew(recordings):
    class Config:
        window = 4

    config = Config()
    mask = lambda b, h, q, k: q - k <= config.window
    assert form_of(_identity, mask).left == 4
    config.window = 5
    assert form_of(_identity, mask).left == 5
    listed = [1]
    mask = lambda b, h, q, k: q - k <= listed[0]
    assert form_of(_identity, mask).left == 1
    listed[0] = 2
    assert form_of(_identity, mask).left == 2


def test_a_function_that_calls_itself_and_the_size_of_the_cache(recordings):
    def mask(b, h, q, k, again=True):
        return mask(b, h, q, k, False) & (q - k < 3) if again else k <= q

    assert form_of(_identity, mask)[2:4] == (2, 0)
    for n in range(1, 5 + _flex_cache._MOST):
        _flex_cache._forms[n] = (Form(), None)
    form_of(_identity, _causal)
    assert len(_flex_cache._forms) < 5 + _flex_cache._MOST
