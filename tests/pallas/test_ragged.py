"""Ragged paged attention: its meaning, the kernel in JAX's interpreters, a serving step, the TPU compiler, bad input."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchax
from hypothesis import example, given
from hypothesis import strategies as st
from torchax import interop

from helpers import examples

pytest.importorskip("torchax_ops_pallas")
from jax._src import literals
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from torchax_ops_pallas import ragged
from torchax_ops_pallas.lowerings import KernelUnavailable
from torchax_ops_pallas.ragged import ragged_paged_attention

_TOKENS, _OF_EACH, _PAGES, _SIZE = 24, 3, 12, 8


class _Batch(NamedTuple):
    """New tokens and positions before them of each sequence; so many more that are not there, and a number for what is random."""

    new: list[int]
    before: list[int]
    unused: int = 0
    seed: int = 0


@st.composite
def _batches(draw, sequences=4):
    n = draw(st.integers(0, sequences))
    new: list[int] = []
    for _ in range(n):
        new.append(draw(st.integers(0, min(12, _TOKENS - sum(new)))))
    before = [draw(st.integers(0, _OF_EACH * _SIZE - t)) for t in new]
    return _Batch(new, before, sequences - n, draw(st.integers(0, 99)))


def _operands(batch, heads=4, key_heads=2, features=8, dtype=torch.float64):
    """Whatever is not looked at holds garbage."""
    rng = torch.Generator().manual_seed(batch.seed)
    garbage = lambda n, low=-9, high=99: torch.randint(low, high, (n,), generator=rng)
    lengths = torch.tensor([t + b for t, b in zip(batch.new, batch.before, strict=True)], dtype=torch.int64)
    indices = torch.randint(-1, 99, (len(lengths) + batch.unused, _OF_EACH), generator=rng)
    pages = torch.randn(_PAGES, _SIZE, 2 * key_heads, features, generator=rng).to(dtype)
    free = torch.randperm(_PAGES, generator=rng).tolist()
    for i, n in enumerate(lengths.tolist()):
        for j in range(-(-n // _SIZE)):
            page = free.pop()
            indices[i, j] = page
            pages[page, max(0, n - j * _SIZE) :] = torch.nan
    starts = torch.tensor([0, *batch.new]).cumsum(0)
    return (
        torch.randn(_TOKENS, heads, features, generator=rng).to(dtype),
        pages,
        torch.cat([lengths, garbage(batch.unused)]).int(),
        indices.int(),
        torch.cat([starts, garbage(batch.unused)]).int(),
        torch.tensor([len(lengths)], dtype=torch.int32),
    )


def _reference(query, pages, lengths, page_indices, starts, count, scale, window=None, soft_cap=None):
    """In float64, token by token, position by position."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    group, size = query.shape[1] * 2 // pages.shape[2], pages.shape[1]
    for b in range(int(count)):
        first, end, n = int(starts[b]), int(starts[b + 1]), int(lengths[b])
        for token in range(first, end):
            own = n - (end - token)
            seen = range(0 if window is None else max(0, own - window + 1), own + 1)
            rows = torch.stack([pages[page_indices[b, i // size], i % size] for i in seen]).double()
            for head in range(query.shape[1]):
                keys, values = rows[:, head // group * 2], rows[:, head // group * 2 + 1]
                scores = keys @ query[token, head].double() * scale
                if soft_cap is not None:
                    scores = torch.tanh(scores / soft_cap) * soft_cap
                out[token, head] = scores.softmax(0) @ values
    return out


_AWKWARD = [
    _Batch([], [], 4),  # no sequence
    _Batch([0, 0], [0, 9], 2),  # no token
    _Batch([8, 0, 8, 0], [0, 0, 3, 7]),  # ends of sequences at ends of blocks, then one without a token
    _Batch([0, 12, 12], [16, 12, 0], 1),  # all tokens, first a sequence without one
]


def _with_awkward(function):
    for batch in _AWKWARD:
        function = example(batch=batch)(function)
    return function


@pytest.mark.parametrize(
    ("heads", "key_heads", "window", "cap"), [((4), 2, None, None), (3, 1, 5, None), (4, 4, 1, 3.0)]
)
@examples(5)
@_with_awkward
@given(batch=_batches())
def test_the_meaning(heads, key_heads, window, cap, batch):
    operands = _operands(batch, heads, key_heads)
    found = ragged_paged_attention(*operands, scale=0.3, window=window, soft_cap=cap)
    torch.testing.assert_close(found, _reference(*operands, 0.3, window, cap))


@functools.cache
def _interpreted(window, cap):
    """All queries in one block: what the kernel writes into prefetched scalars for the next one is lost there."""

    def run(*operands):
        with pltpu.force_tpu_interpret_mode(True):
            return ragged.ragged_paged_attention_kernel(*operands, 0.1, window, cap)

    return jax.jit(run)


def _arrays(operands):
    return [jnp.asarray(t.float().numpy(), jnp.bfloat16) if t.is_floating_point() else t.numpy() for t in operands]


def _check_kernel(run, batch, heads, key_heads, window, cap):
    operands = _operands(batch, heads, key_heads, 128, torch.bfloat16)
    found = np.asarray(run(*_arrays(operands)), np.float64)
    np.testing.assert_allclose(found, _reference(*operands, 0.1, window, cap), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("heads", "key_heads", "window", "cap"), [(4, 2, None, None), (8, 1, 5, 3.0)])
@examples(8)
@_with_awkward
@given(batch=_batches())
def test_the_kernel_in_plain_operations(monkeypatch, heads, key_heads, window, cap, batch):
    # JAX's rule for stores asks positions for their shape, and positions that are numbers have none.
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    monkeypatch.setattr(ragged, "_BYTES_AT_ONCE", 1)  # one page
    _check_kernel(_interpreted(window, cap), batch, heads, key_heads, window, cap)


def _reads_in_parts(get):
    """JAX's TPU interpreter reads by positions alone; this reads what they leave, and reshapes and bitcasts it here."""

    @functools.wraps(get)
    def read(token, device, core, space, buffer, transforms, *args, **kwargs):
        simple = next((i for i, t in enumerate(transforms) if not hasattr(t, "indices")), len(transforms))
        token, x = get(token, device, core, space, buffer, transforms[:simple], *args, **kwargs)
        for t in transforms[simple:]:
            if hasattr(t, "indices"):
                parts = (int(i) if not hasattr(i, "size") else i for i in t.indices)
                x = x[
                    tuple(
                        i if isinstance(i, int) else slice(int(i.start), int(i.start) + i.size * i.stride, i.stride)
                        for i in parts
                    )
                ]
            elif hasattr(t, "shape"):
                x = x.reshape(t.shape)
            else:  # two rows of 16 bits in one of 32
                assert (x.dtype.itemsize, np.dtype(t.dtype).itemsize) == (2, 4)
                halves = x.view(np.uint16).reshape(-1, 2, x.shape[1]).astype(np.uint32)
                x = halves[:, 0] | halves[:, 1] << 16
        return token, x

    return read


_copies: list[int] = []  # of all calls, since compiled programs keep the functions that they were traced with


def _counted(step, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        _copies.append(step)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("batch", [*_AWKWARD, _Batch([1, 9, 1], [20, 0, 3], 1)])
def test_the_kernel_waits_for_what_it_reads(monkeypatch, batch):
    """In the TPU interpreter, where memory holds NaN before a copy is waited for."""
    monkeypatch.setattr(ragged, "_QUERIES_AT_ONCE", 8)
    monkeypatch.setattr(ragged, "_BYTES_AT_ONCE", 1)
    monkeypatch.setattr(interpret_pallas_call, "get", _reads_in_parts(interpret_pallas_call.get))
    for name, step in (("dma_start", 1), ("dma_wait", -1)):
        monkeypatch.setattr(interpret_pallas_call, name, _counted(step, getattr(interpret_pallas_call, name)))
    _copies.clear()
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)

    def run(*operands):
        with jax.enable_x64(False), pltpu.force_tpu_interpret_mode(params):
            return ragged.in_kernel(*operands, sm_scale=0.1, sliding_window=5, soft_cap=3.0)

    _check_kernel(
        run, batch, 8, 1, 5, 3.0
    )  # it takes masked stores for wrong where a later dimension is smaller than the first
    assert _copies and sum(_copies) == 0  # a copy that is left open would fail the next kernel
    assert not interpret_pallas_call.races.races_found


def test_on_the_device():
    batch = _Batch([3, 0, 9], [2, 5, 8], 1)
    for dtype in (torch.float32, torch.bfloat16):
        operands = _operands(batch, dtype=dtype)
        found = ragged_paged_attention(*(t.to("jax") for t in operands), window=6, soft_cap=2.0)
        assert found.dtype == dtype and found.device.type == "jax"
        expected = _reference(*operands, 8**-0.5, 6, 2.0)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_serving_prompts_and_single_tokens_in_one_program():
    torch.manual_seed(0)
    heads, features, size = 2, 8, 4
    pages = torch.zeros(9, size, 2 * heads, features, device="jax")
    page_indices = torch.randperm(9).reshape(3, 3).int()
    prompts = [5, 3, 0]

    @torchax.compile
    def step(query, key, value, sequence, position, lengths, starts):
        page = page_indices.to("jax")[sequence, position // size]
        pages[page, position % size] = torch.stack([key, value], 2).flatten(1, 2)
        return ragged_paged_attention(query, pages, lengths, page_indices.to("jax"), starts)

    seen, lengths = [torch.zeros(3, 0, heads, features)] * 3, [0, 0, 0]
    for new in (prompts, [1, 1, 6], [1, 1, 1]):
        parts = [torch.randn(3, n, heads, features) for n in new]
        query, key, value = (F.pad(t, (0, 0, 0, 0, 0, 8 - sum(new))) for t in torch.cat(parts, 1))
        sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(new))
        position = torch.cat([torch.arange(n, n + t) for n, t in zip(lengths, new, strict=True)])
        spare = 8 - sum(new)  # rows of no sequence write where nobody reads
        sequence, position = F.pad(sequence, (0, spare), value=2), F.pad(position, (0, spare), value=11)
        lengths = [n + t for n, t in zip(lengths, new, strict=True)]
        starts = torch.tensor([0, *new]).cumsum(0)
        integers = (torch.tensor(lengths).int(), starts.int())
        found = step(*(t.to("jax") for t in (query, key, value, sequence, position, *integers))).cpu()
        seen = [torch.cat(pair, 1) for pair in zip(seen, parts, strict=True)]
        for whole, n, first in zip(seen, new, starts.tolist(), strict=False):
            q, k, v = whole.transpose(1, 2)
            dense = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
            torch.testing.assert_close(found[first : first + n], dense[len(dense) - n :], rtol=1e-4, atol=1e-5)
        assert not found[sum(new) :].any()
    assert step.cache_info().misses == 1


def test_required_says_why_not():
    batch = _Batch([3, 0, 9], [2, 5, 8])
    for words, options in {
        "platform tpu": {},
        "1, 2, 4 or a multiple of 8, they are 3": {"heads": 3, "key_heads": 3},
        "2 key heads must be 128 wide": {"features": 256},
        "bfloat16": {"dtype": torch.float32},
    }.items():
        operands = _operands(batch, **{"features": 128, "dtype": torch.bfloat16} | options)
        with torchax.config.override(pallas="required"), pytest.raises(KernelUnavailable, match=words):
            ragged_paged_attention(*(t.to("jax") for t in operands))


@pytest.mark.parametrize("device", ["cpu", "jax"])
def test_a_gradient_is_refused(device):
    query, *rest = (t.to(device) for t in _operands(_Batch([3], [2]), dtype=torch.float32))
    out = ragged_paged_attention(query.requires_grad_(), *rest)
    with pytest.raises(NotImplementedError, match=r"torch.no_grad\(\)"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        ({0: lambda t: t[0]}, {}, ValueError, "query with 3 dimensions"),
        ({1: lambda t: t[:, :, :3]}, {}, ValueError, "key heads divide heads"),
        ({4: lambda t: t[1:]}, {}, ValueError, r"of n, n, n \+ 1 and 1 elements; they are of 2, 2, 2"),
        ({1: lambda t: t.float()}, {}, TypeError, "one floating-point dtype"),
        ({3: lambda t: t.long()}, {}, TypeError, r"page_indices must be int32; it is torch.int64: call .int\(\)"),
        ({}, {"window": 0}, ValueError, "window must be at least 1"),
        ({}, {"soft_cap": 0.0}, ValueError, "soft_cap must be positive"),
    ],
)
def test_bad_input(change, options, error, words):
    operands = [change.get(i, lambda t: t)(t) for i, t in enumerate(_operands(_Batch([3, 4], [2, 0])))]
    with pytest.raises(error, match=words):
        ragged_paged_attention(*operands, **options)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("topology", "heads", "key_heads", "features", "size"),
    [
        ("v5e:2x2", 32, 8, 128, 16),
        ("v5e:2x2", 28, 4, 128, 64),
        ("v5p:2x2x1", 16, 16, 128, 8),
        ("v4:2x2x1", 4, 1, 256, 32),
        ("v6e:2x2", 4, 1, 256, 32),
    ],
)
@pytest.mark.usefixtures("full_effort")
def test_the_tpu_compiler_gathers_no_pages(topology, heads, key_heads, features, size):
    pytest.importorskip("libtpu")
    operands = (
        torch.empty(250, heads, features, dtype=torch.bfloat16, device="meta"),
        torch.empty(8192 // size, size, 2 * key_heads, features, dtype=torch.bfloat16, device="meta"),
        torch.empty(9, dtype=torch.int32, device="meta"),
        torch.empty(9, 4096 // size, dtype=torch.int32, device="meta"),
        torch.empty(10, dtype=torch.int32, device="meta"),
        torch.empty(1, dtype=torch.int32, device="meta"),
    )
    call = lambda *t: ragged_paged_attention(*t, window=1024, soft_cap=30.0)
    found = interop.aot_compile(call, operands, topology, mesh={"data": 1})
    assert list(found.kernels.values()) == [1]
    assert found.temporary_bytes < 2**20 < key_heads * 2 * 4096 * features * 2  # pages of one sequence


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("full_effort")
def test_temporary_memory_with_and_without_the_kernel():
    """The figures of docs/kernels.md: ``pytest -s`` prints them."""
    pytest.importorskip("libtpu")
    empty = lambda *shape, dtype=torch.int32: torch.empty(*shape, dtype=dtype, device="meta")
    query, pages = (empty(*shape, dtype=torch.bfloat16) for shape in ((1024, 32, 128), (4096, 16, 16, 128)))
    operands = (query, pages, empty(8), empty(8, 512), empty(9), empty(1))
    mib = {}
    for mode in ("auto", "off"):
        with torchax.config.override(pallas=mode):
            found = interop.aot_compile(lambda *t: ragged_paged_attention(*t), operands, "v5e:2x2", mesh={"data": 1})
        mib[mode] = found.temporary_bytes / 2**20
    print(f"\nragged_paged_attention, temporary MiB: {mib['auto']:.1f} with the kernel, {mib['off']:,.0f} without")
    assert mib["auto"] < 16 < 0.1 * mib["off"]
