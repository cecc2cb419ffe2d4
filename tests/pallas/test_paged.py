"""Paged attention: its meaning on each device, the kernel in the interpreter, a decoding loop, the TPU compiler, bad input."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchax
from hypothesis import given
from hypothesis import strategies as st
from torchax import interop

from helpers import examples

pytest.importorskip("torchax_ops_pallas")
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from torchax_ops_pallas.lowerings import KernelUnavailable
from torchax_ops_pallas.paged import _in_blocks, in_kernel, paged_attention


def _operands(sequences=2, heads=4, key_heads=2, features=128, pages=10, size=16, of_each=4, dtype=torch.bfloat16):
    cache = (key_heads, pages, size, features)
    return (
        torch.randn(sequences, heads, features, dtype=dtype),
        torch.randn(cache, dtype=dtype),
        torch.randn(cache, dtype=dtype),
        torch.randint(1, of_each * size + 1, (sequences,), dtype=torch.int32),
        torch.randint(0, pages, (sequences, of_each), dtype=torch.int32),
    )


def _reference(query, key_pages, value_pages, lengths, page_indices, scale, cap):
    """In float64, position by position."""
    out, groups = [], query.shape[1] // key_pages.shape[0]
    for q, n, pages in zip(query.double(), lengths.tolist(), page_indices.tolist(), strict=True):
        if n == 0:
            out.append(torch.zeros_like(q))
            continue
        places = [(pages[i // key_pages.shape[2]], i % key_pages.shape[2]) for i in range(n)]
        keys, values = (
            torch.stack([cache[:, p, i].double() for p, i in places], 1).repeat_interleave(groups, 0)
            for cache in (key_pages, value_pages)
        )
        scores = (keys @ q[..., None]).squeeze(-1) * scale
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        out.append((scores.softmax(-1)[:, None] @ values).squeeze(1))
    return torch.stack(out)


@examples(5)
@given(
    sequences=st.integers(1, 3),
    heads=st.sampled_from([(2, 2), (4, 1), (8, 1), (8, 2)]),
    features=st.sampled_from([128, 256]),
    size=st.sampled_from([8, 16, 32]),
    of_each=st.integers(1, 4),
    cap=st.none() | st.floats(1, 10),
)
def test_values(sequences, heads, features, size, of_each, cap):
    torch.manual_seed(size)
    operands = _operands(sequences, *heads, features, 7, size, of_each)
    expected = _reference(*operands, 0.1, cap)
    on_jax = [t.to("jax") for t in operands]
    torch.testing.assert_close(
        paged_attention(*operands, scale=0.1, soft_cap=cap).double(), expected, rtol=1e-2, atol=1e-2
    )
    for mode in ("auto", "interpret"):
        with torchax.config.override(pallas=mode):
            found = paged_attention(*on_jax, scale=0.1, soft_cap=cap)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-2, atol=1e-2)


def test_a_decoding_loop_writes_pages_by_plain_indexing():
    torch.manual_seed(0)
    heads, size, features, steps = 2, 4, 8, 10
    keys, values = (torch.zeros(heads, 12, size, features, device="jax") for _ in range(2))
    page_indices = torch.randperm(12)[:6].reshape(2, 3).int().to("jax")

    @torchax.compile
    def step(query, key, value, lengths):
        page = page_indices[torch.arange(2, device="jax"), lengths // size]
        keys[:, page, lengths % size] = key.transpose(0, 1)
        values[:, page, lengths % size] = value.transpose(0, 1)
        return paged_attention(query, keys, values, lengths + 1, page_indices)

    seen = [[], []]
    for i in range(steps):
        query, key, value = torch.randn(3, 2, heads, features)
        lengths = torch.full((2,), i, dtype=torch.int32)
        found = step(*(t.to("jax") for t in (query, key, value, lengths)))
        seen[0].append(key)
        seen[1].append(value)
        dense = F.scaled_dot_product_attention(query[:, :, None], *(torch.stack(x, 2) for x in seen))
        torch.testing.assert_close(found.cpu(), dense[:, :, 0], rtol=1e-4, atol=1e-5)
    assert step.cache_info().misses <= 2


def test_required_says_why_not():
    operands = [t.to("jax") for t in _operands()]
    narrow = [t.to("jax") for t in _operands(features=64)]
    with torchax.config.override(pallas="required"):
        with pytest.raises(KernelUnavailable, match="platform tpu"):
            paged_attention(*operands)
        with pytest.raises(KernelUnavailable, match="multiple of 128"):
            paged_attention(*narrow)
        with pytest.raises(KernelUnavailable, match="bfloat16"):
            paged_attention(*[t.float() if t.is_floating_point() else t for t in operands])


@pytest.mark.parametrize("device", ["cpu", "jax"])
def test_a_gradient_is_refused(device):
    query, *rest = (t.to(device) for t in _operands(dtype=torch.float32))
    out = paged_attention(query.requires_grad_(), *rest)
    with pytest.raises(NotImplementedError, match=r"torch.no_grad\(\)"):
        out.sum().backward()


def _awkward():
    """Sequences of no keys among others, entries that are no pages, garbage where nothing was written, a prime number of pages."""
    query, keys, values, lengths, page_indices = _operands(6, 4, 2, 128, 14, 8, 5)
    lengths[:] = torch.tensor([0, 17, 0, 0, 40, 0])
    page_indices[torch.arange(5) * 8 >= lengths[:, None]] = -1
    page_indices[lengths <= 32, 4] = 99
    return query, keys, values, lengths, page_indices


@pytest.mark.parametrize("keys_at_once", [8, 24, 512])
@pytest.mark.parametrize("interpret", [True, pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)])
def test_awkward_sequences_in_the_kernel(interpret, keys_at_once):
    torch.manual_seed(0)
    operands = _awkward()
    arrays = [jnp.asarray(t.float().numpy(), jnp.bfloat16) if t.is_floating_point() else t.numpy() for t in operands]
    found = in_kernel(*arrays, scale=0.1, soft_cap=3.0, keys_at_once=keys_at_once, interpret=interpret)
    expected = _reference(*operands, 0.1, 3.0)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-2, atol=1e-2)
    if interpret is not True:
        assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("device", ["cpu", "jax"])
def test_awkward_sequences(device):
    torch.manual_seed(0)
    query, keys, values, lengths, page_indices = (t.double() if t.is_floating_point() else t for t in _awkward())
    expected = _reference(query, keys, values, lengths, page_indices, 0.1, None)
    unread = torch.ones(14, 8, dtype=torch.bool)
    for n, pages in zip(lengths.tolist(), page_indices.tolist(), strict=True):
        for i in range(n):
            unread[pages[i // 8], i % 8] = False
    keys[:, unread] = values[:, unread] = torch.nan
    operands = (t.to(device) for t in (query, keys, values, lengths, page_indices))
    torch.testing.assert_close(paged_attention(*operands, scale=0.1).cpu(), expected)


@pytest.mark.parametrize(
    ("pages", "at_once", "blocks"), [(13, 4, (4, 4)), (5, 8, (1, 5)), (1, 1, (1, 1)), (64, 32, (2, 32))]
)
def test_pages_are_filled_up_to_equal_blocks(pages, at_once, blocks):
    indices = jnp.arange(1, pages + 1)[None]
    filled, found = _in_blocks(indices, at_once)
    assert (filled.shape[1] // found, found) == blocks and filled.shape[1] % found == 0
    assert filled[0].tolist() == [*range(1, pages + 1), *[0] * (filled.shape[1] - pages)]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({0: lambda t: t[0]}, ValueError, "query with 3 dimensions"),
        ({2: lambda t: t[:1]}, ValueError, "of one shape"),
        ({0: lambda t: t[:, :3]}, ValueError, "key heads divide heads"),
        ({3: lambda t: t[:1]}, ValueError, "of 2, 1 and 2 sequences"),
        ({4: lambda t: t[0]}, ValueError, "page_indices with 2 dimensions"),
        ({0: lambda t: t.float()}, TypeError, "one floating-point dtype"),
        ({3: lambda t: t.long()}, TypeError, "call .int()"),
    ],
)
def test_bad_input(change, error, words):
    operands = [change.get(i, lambda t: t)(t) for i, t in enumerate(_operands())]
    with pytest.raises(error, match=words.replace("(", r"\(").replace(")", r"\)")):
        paged_attention(*operands)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("topology", "heads", "key_heads", "size", "of_each"),
    [
        ("v4:2x2x1", 32, 8, 16, 251),
        ("v5e:2x2", 32, 8, 16, 251),
        ("v5e:2x2", 8, 1, 32, 128),
        ("v5p:2x2x1", 16, 16, 128, 32),
        ("v6e:2x2", 8, 1, 32, 128),
    ],
)
def test_the_tpu_compiler_gathers_no_pages(topology, heads, key_heads, size, of_each):
    pytest.importorskip("libtpu")
    operands = _operands(8, heads, key_heads, 128, 8192 // size, size, of_each)
    found = interop.aot_compile(lambda *t: paged_attention(*t), operands, topology, mesh={"data": 1})
    assert list(found.kernels.values()) == [1]
    assert found.temporary_bytes < 2**20 < key_heads * 8 * of_each * size * 128 * 2
