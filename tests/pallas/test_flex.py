"""`flex_attention` in known forms: the kernel's values and gradients, when it is chosen, and what the TPU compiler makes of it."""

from __future__ import annotations

import pytest
import torch
import torchax
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torchax import interop

from helpers import examples

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


@examples(4)
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
        with pytest.raises(KernelUnavailable, match="score_mod is of no known form: it uses aten.sub"):
            flex_attention(*operands, score_mod=lambda s, b, h, q, k: s - (q - k).abs())
        with pytest.raises(KernelUnavailable, match="max_scores"):
            flex_attention(*operands, return_aux=AuxRequest(max_scores=True))
        with torch.autocast("jax"), pytest.raises(KernelUnavailable, match="autocast"):
            flex_attention(*operands)
        longer = torch.zeros(200, dtype=torch.int64, device="jax")
        with pytest.raises(KernelUnavailable, match=r"documents of shape \[200\]"):
            flex_attention(*operands, block_mask=_block(lambda b, h, q, k: longer[q] == longer[k]))
    with torchax.config.override(pallas="interpret"):  # elsewhere it goes the plain way
        alibi = flex_attention(*operands, score_mod=lambda s, b, h, q, k: s - (q - k).abs())
        _, aux = flex_attention(*operands, return_aux=AuxRequest(lse=True, max_scores=True))
    assert alibi.isfinite().all() and aux.lse.isfinite().all() and aux.max_scores.isfinite().all()


def _block(mask, length=128):
    return create_block_mask(mask, None, None, length, length, device="jax")


def _documents(batch=None, length=128, dtype=torch.int32):
    """Of uneven lengths; with a batch, others in each."""
    ids = torch.tensor([3 * i * i // 100 for i in range(length)], dtype=dtype)
    return (ids if batch is None else torch.stack([ids, *[ids.flip(0)] * (batch - 1)])).to("jax")


def _masks():
    shared, each, far = _documents(), _documents(2), _documents(dtype=torch.int64) << 32
    return {
        "documents": (lambda b, h, q, k: shared[q] == shared[k], lambda q, k, b: shared[q] == shared[k]),
        "causal documents": (
            lambda b, h, q, k: (q >= k) & (shared[q] == shared[k]),
            lambda q, k, b: (q >= k) & (shared[q] == shared[k]),
        ),
        "documents of each batch": (
            lambda b, h, q, k: (each[b, q] == each[b, k]) & (q - k < 20),
            lambda q, k, b: (each[b, q] == each[b, k]) & (q - k < 20),
        ),
        "64-bit documents": (lambda b, h, q, k: far[q] == far[k], lambda q, k, b: far[q] == far[k]),
        "prefix": (lambda b, h, q, k: (k < 37) | (k <= q), lambda q, k, b: (k < 37) | (k <= q)),
    }


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("documents", True),
        ("causal documents", False),
        ("documents of each batch", True),
        ("64-bit documents", True),
        ("prefix", False),
    ],
)
def test_documents_prefixes_and_statistics(name, compiled, monkeypatch):
    """Values, logarithms of sums, and gradients through both, where no scores can be held: `math_attention` is gone."""
    mask, seen = _masks()[name]
    torch.manual_seed(0)
    exact = [torch.randn(2, n, 128, 16, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1)]
    q, k = torch.arange(128)[:, None], torch.arange(128)
    visible = torch.stack([seen(q.to("jax"), k.to("jax"), b).cpu().expand(128, 128) for b in range(2)])
    keys, values = (t.repeat_interleave(2, 1) for t in exact[1:])
    scores = (exact[0] @ keys.mT / 4).masked_fill(~visible[:, None], -torch.inf)
    expected, lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
    weights = torch.randn(expected.shape, dtype=torch.float64), torch.randn(lse.shape, dtype=torch.float64)
    grads = torch.autograd.grad((expected * weights[0]).sum() + (lse * weights[1]).sum(), exact)
    block = _block(mask)

    def run(*qkv):
        out, aux = flex_attention(*qkv, block_mask=block, enable_gqa=True, return_aux=AuxRequest(lse=True))
        loss = sum((x * w.float().to("jax")).sum() for x, w in zip((out, aux.lse), weights, strict=True))
        return out.detach(), aux.lse.detach(), *torch.autograd.grad(loss, qkv)

    def gone(*_):
        raise AssertionError("no kernel")

    import torchax_interop.flex

    monkeypatch.setattr(torchax_interop.flex, "math_attention", gone)
    ours = [t.detach().float().to("jax").requires_grad_() for t in exact]
    with torchax.config.override(pallas="interpret"):
        found = (torchax.compile(run) if compiled else run)(*ours)
    for a, b in zip(found, (expected, lse, *grads), strict=True):
        torch.testing.assert_close(a.cpu().double(), b.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["causal documents", "documents of each batch", "prefix"])
def test_the_parts_mean_the_same(name):
    mask, _ = _masks()[name]
    operands = [torch.randn(2, 1, 128, 16, device="jax", requires_grad=True) for _ in range(3)]
    found = []
    for mode in ("interpret", "off"):
        with torchax.config.override(pallas=mode):
            out, lse = flex_attention(*operands, block_mask=_block(mask), return_lse=True)
            (g,) = torch.autograd.grad(out.square().sum() + lse.sum(), operands[0], create_graph=True)
            found.append((out, lse, g, torch.autograd.grad(g.square().sum(), operands[1])[0]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_divided_over_devices(virtual_mesh):
    mesh = virtual_mesh((2, 2))
    documents = _documents(2)
    block = _block(lambda b, h, q, k: (q >= k) & (documents[b, q] == documents[b, k]))

    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(32, 64) for _ in range(3))
            self.o_proj = torch.nn.Linear(64, 32)

        def forward(self, x):
            q, k, v = (p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            out, lse = flex_attention(q, k, v, block_mask=block, return_lse=True)
            return self.o_proj(out.transpose(1, 2).flatten(2)) + lse.mean()

    torch.manual_seed(0)
    model, x = Attend().to("jax"), torch.randn(2, 128, 32, device="jax")
    expected = model(x)
    expected.square().sum().backward()
    gradient = model.q_proj.weight.grad
    model.zero_grad()
    with torchax.config.override(pallas="interpret"):
        model = interop.shard_module(model, mesh, interop.tensor_parallel("model"))
        found = torchax.compile(model)(interop.shard_batch(x, mesh))
        found.square().sum().backward()
    torch.testing.assert_close(found.detach().cpu(), expected.detach().cpu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.q_proj.weight.grad.cpu(), gradient.cpu(), rtol=1e-3, atol=1e-3)


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


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["causal documents", "prefix"])
@pytest.mark.usefixtures("full_effort")
def test_the_tpu_compiler_takes_documents_prefixes_and_statistics(name):
    pytest.importorskip("libtpu")

    def step(query, key, value, documents):
        masks = {
            "causal documents": lambda b, h, q, k: (q >= k) & (documents[b, q] == documents[b, k]),
            "prefix": lambda b, h, q, k: (q >= k) | (k < 300),
        }
        block = create_block_mask(lambda b, h, q, k: q >= k, None, None, 1024, 1024, device="jax")
        block.mask_mod = masks[name]
        out, lse = flex_attention(query, key, value, block_mask=block, enable_gqa=True, return_lse=True)
        return torch.autograd.grad(out.float().square().mean() + lse.mean(), (query, key, value))

    operands = [torch.empty(2, n, 1024, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (4, 2, 2)]
    documents = torch.zeros(2, 1024, dtype=torch.int64, device="meta")
    with torchax.config.override(pallas="required"):
        found = interop.aot_compile(step, (*operands, documents), "v5e:2x2", mesh={"data": 1})
    assert sorted(found.kernels.values()) == [1, 1, 1] and all("splash" in kernel for kernel in found.kernels)
    assert found.temporary_bytes < 16 * 2**20  # the scores take 32 MiB
