"""Properties that hold for whole groups of ops, whatever the layout, the dtypes and the values: the result is CPU's, or the error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torchax.testing.samples import tensor_to_jax
from torchax.testing.strategies import (
    COMPLEX,
    DTYPES,
    FLOATS,
    INTS,
    Draft,
    broadcast_pairs,
    numbers,
    shapes,
    small,
    tensors,
    values,
)

UNARY = [
    "neg",
    "abs",
    "sign",
    "floor",
    "relu",
    "sigmoid",
    "exp",
    "sqrt",
    "isnan",
    "logical_not",
    "square",
    "reciprocal",
]
BINARY = ["add", "sub", "mul", "div", "eq", "lt", "ge", "maximum", "fmin", "logical_xor", "atan2", "copysign"]
SCALAR = ["add", "sub", "mul", "true_divide", "eq", "gt", "ne", "le"]
ALONG = [
    "sum", "prod", "mean", "amax", "argmin", "any", "all", "logsumexp", "var", "median", "cumsum", "softmax", "flip", "sort", "norm",
    "squeeze", "unsqueeze", "cummax", "logcumsumexp",
]  # fmt: skip
POSITIONAL = {
    "norm": lambda t, d: t.norm(2, d),
    "sort": lambda t, d: t.sort(dim=d, stable=True),
    "median": lambda t, d: t.median(d).values,
}


def outcome(fn: Any, *args: Any) -> tuple[Any, BaseException | None]:
    try:
        return fn(*args), None
    except Exception as error:
        return None, error


def strides_that_matter(t: torch.Tensor) -> list[int]:
    return [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] if t.numel() else []


def agree(fn: Any, *args: Any, errors: Any = None) -> None:
    """`fn` gives on device jax what it gives on CPU: structure, dtypes, shapes, strides, values, or the class of its error.

    `errors`: classes that will do, where CPU torch's own choice depends on the layout.
    """
    cpu = [a.make() if isinstance(a, Draft) else a for a in args]
    ours = [tensor_to_jax(a) if isinstance(a, torch.Tensor) else a for a in cpu]
    want, wrong = outcome(fn, *cpu)
    got, error = outcome(fn, *ours)
    if isinstance(wrong, NotImplementedError):  # CPU has no kernel for the dtype; an accelerator may
        return
    if wrong is not None:
        kind = errors or type(wrong)
        assert isinstance(error, kind), f"CPU raises {wrong!r}; on jax: {error!r} {got!r}"
        return
    if error is not None:
        raise error
    want, got = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (want, got))
    for w, g in zip(want, got, strict=True):
        assert g.device.type == "jax" and g.dtype == w.dtype and g.shape == w.shape, (
            f"{g.dtype} {g.shape} for {w.dtype} {w.shape}"
        )
        assert strides_that_matter(g) == strides_that_matter(w), f"strides {g.stride()} for {w.stride()}"
        torch.testing.assert_close(g.cpu(), w, equal_nan=True)


@pytest.mark.parametrize("name", UNARY)
@given(x=tensors())
def test_unary(name, x):
    agree(getattr(torch, name), x)


def test_comparisons_of_half_and_complex_round_to_half():
    agree(torch.eq, Draft((1, 2), (2,), torch.float16), Draft((1.0001 + 0j,), (), torch.complex64))


@pytest.mark.parametrize("name", BINARY)
@given(data=st.data(), pair=broadcast_pairs())
def test_binary(name, data, pair):
    dtypes = (*FLOATS, *INTS, torch.bool) if name in ("lt", "ge", "maximum", "fmin", "atan2", "copysign") else DTYPES
    x = data.draw(tensors(pair[0], dtypes))
    same = data.draw(st.booleans())  # the limits of one dtype are not those of another
    y = data.draw(tensors(pair[1], (x.dtype,) if same else dtypes, values if same else small))
    if not same:
        x = data.draw(tensors(pair[0], dtypes, small))
    agree(getattr(torch, name), x, y)


@given(
    pair=broadcast_pairs(), left=st.sampled_from(DTYPES), right=st.sampled_from(DTYPES), number=st.none() | numbers()
)
def test_promotion(pair, left, right, number):
    x = torch.zeros(pair[0], dtype=left)
    y = torch.zeros(pair[1], dtype=right) if number is None else number
    jx, jy = x.to("jax"), y.to("jax") if number is None else y
    expected, wrong = outcome(torch.result_type, x, y)
    assert outcome(torch.result_type, jx, jy)[0] == expected
    if wrong is None:
        assert (jx * jy).dtype == expected
        assert torch.where(torch.ones((), dtype=torch.bool, device="jax"), jx, jy).dtype == expected


@pytest.mark.parametrize("name", SCALAR)
@given(x=tensors(), number=numbers())
@example(Draft((1,), (2,), torch.int16), True)  # a bool cannot be subtracted
@example(Draft((False,), (1,), torch.bool), 1e39)  # inf in float32, and 0 * inf is NaN
def test_numbers_at_the_limits(name, x, number):
    # CPU turns the imaginary part to NaN when the real part overflows (it multiplies by alpha = 1 + 0j)
    assume(not x.dtype.is_complex or abs(number) <= torch.finfo(x.dtype).max)
    agree(getattr(torch, name), x, number)


@pytest.mark.parametrize("name", ["add_", "mul_", "fill_", "clamp_min_", "eq_"])
@given(x=tensors(dtypes=(*FLOATS, *INTS)), number=numbers())
def test_in_place_numbers(name, x, number):
    agree(lambda t, n: getattr(t.clone(), name)(n), x, number)


@pytest.mark.parametrize("name", ALONG)
@given(
    x=tensors(dtypes=(torch.float32, torch.float64, torch.int64, torch.uint8), elements=small), dim=st.integers(-4, 4)
)
def test_dimensions(name, x, dim):
    assume(name != "cummax" or math.prod(x.shape))  # CPU torch does not look at the dimension then
    agree(POSITIONAL.get(name, lambda t, d: getattr(t, name)(d)), x, dim)


@given(
    x=tensors(shapes(3, 4), dtypes=(torch.float32,)),
    dims=st.lists(st.integers(-3, 2), max_size=3),
    keepdim=st.booleans(),
)
def test_several_dimensions(x, dims, keepdim):
    agree(lambda t: torch.sum(t, dims, keepdim), x)
    agree(lambda t: torch.permute(t, dims), x)


@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
def test_index_tensors(data, shape):
    """Negative and out-of-range values included: then both raise."""
    x = data.draw(tensors(shape, (torch.float32, torch.int64), small))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    n = shape[dim]
    index = data.draw(tensors((data.draw(st.integers(0, 4)),), (torch.int64,), lambda d: st.integers(-n - 1, n)))

    def read(fn):
        def run(t, i):
            result = fn(t, i)
            if result.device.type == "jax":
                torch.jax.synchronize()
            return result

        return run

    agree(read(lambda t, i: t.movedim(dim, 0)[i]), x, index)
    agree(read(lambda t, i: t.index_select(dim, i)), x, index, errors=(IndexError, RuntimeError))
    agree(read(lambda t, i: t.take(i)), x, index)
    agree(read(lambda t, i: t.clone(memory_format=torch.contiguous_format).index_fill_(dim, i, 3)), x, index)


@given(x=tensors(dtypes=(*FLOATS, *INTS, torch.bool)), dtype=st.sampled_from((*FLOATS, *INTS, torch.bool, *COMPLEX)))
def test_casts(x, dtype):
    cpu = x.make()
    if x.dtype.is_floating_point and not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool:
        info = torch.iinfo(dtype)
        inside = torch.isfinite(cpu) & (cpu > info.min) & (cpu.double() < info.max)
        cpu = torch.where(inside, cpu, 0)  # C++ leaves the others undefined
    got = tensor_to_jax(cpu).to(dtype)
    assert got.dtype == dtype and strides_that_matter(got) == strides_that_matter(cpu.to(dtype))
    torch.testing.assert_close(got.cpu(), cpu.to(dtype), equal_nan=True)


@given(data=st.data(), pair=broadcast_pairs())
def test_where_and_copy(data, pair):
    dtypes = [d for d in DTYPES if d != torch.float16]  # with a complex number it would be complex32
    x, y = (data.draw(tensors(shape, dtypes)) for shape in pair)
    agree(lambda a, b: torch.where(a == a, a, b), x, y)
    agree(
        lambda a, b: torch.zeros(torch.broadcast_shapes(a.shape, b.shape), dtype=a.dtype, device=a.device).copy_(b),
        x,
        y,
    )


def test_drafts_print_as_the_program_that_makes_them():
    draft = Draft((1.0, math.nan, 2.0), (2, 3), torch.float32, "transposed")
    code = repr(Draft((1.0, 2.0, 3.0, 4.0, 5.0, math.inf), (2, 3), torch.float32, "transposed"))
    assert "float('inf')" in code and eval(code).shape == (2, 3)
    assert tensor_to_jax(draft.make()).stride() == draft.make().stride() == (1, 2)
    assert values(torch.bool) is not None
