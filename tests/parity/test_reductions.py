"""Reductions and scans: axes, dtypes, NaN, ties, empty dimensions, accumulation in 16 bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import assert_same

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
REAL = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
SHAPE = (3, 4, 5)
AXES = st.sampled_from([None, 0, 1, -1, (0, 2), (0, 1, 2), (-1, -2), ()])
CELLS = st.sampled_from([0.0, 1.0, 2.0, 3.0])  # few values, so that ties are common
WILD = st.sampled_from([0.0, 1.0, -3.0, math.nan, math.inf, -math.inf])


def filled(elements: st.SearchStrategy[float], dtype: torch.dtype = torch.float32) -> st.SearchStrategy[torch.Tensor]:
    size = math.prod(SHAPE)
    return st.lists(elements, min_size=size, max_size=size).map(lambda v: torch.tensor(v).reshape(SHAPE).to(dtype))


def both(op: Any, x: torch.Tensor, **tolerance: Any) -> None:
    assert_same(op(x.to("jax")), op(x), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), dim=AXES, keepdim=st.booleans())
def test_sums(dtype: torch.dtype, data: st.DataObject, dim: Any, keepdim: bool) -> None:
    x = data.draw(filled(CELLS, dtype))
    both(lambda x: x.sum(dim, keepdim=keepdim), x)
    both(lambda x: torch.any(x, dim, keepdim=keepdim), x)
    both(lambda x: torch.all(x, dim, keepdim=keepdim), x)
    if dtype.is_floating_point:
        both(lambda x: x.mean(dim, keepdim=keepdim), x)
        both(lambda x: x.var(dim, keepdim=keepdim), x)
        both(lambda x: torch.std_mean(x, dim, correction=0, keepdim=keepdim), x)
        if dim != ():
            both(lambda x: torch.logsumexp(x, dim if dim is not None else (0, 1, 2), keepdim), x)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@given(data=st.data(), dim=st.integers(-3, 2), keepdim=st.booleans())
def test_extrema_and_where_they_are(dtype: torch.dtype, data: st.DataObject, dim: int, keepdim: bool) -> None:
    x = data.draw(filled(CELLS, dtype))
    for op in (torch.max, torch.min):
        both(lambda x, op=op: tuple(op(x, dim, keepdim)), x)
        both(op, x)
    for op in (torch.argmax, torch.argmin):
        both(lambda x, op=op: op(x, dim, keepdim), x)
        both(op, x)
    both(lambda x: tuple(torch.aminmax(x, dim=dim, keepdim=keepdim)), x)
    both(lambda x: tuple(torch.cummax(x, dim)), x)
    both(lambda x: tuple(torch.cummin(x, dim)), x)


@given(x=filled(WILD), dim=st.integers(-3, 2))
def test_nan_and_infinities(x: torch.Tensor, dim: int) -> None:
    for op in (torch.max, torch.min, torch.cummax, torch.cummin):
        both(lambda x, op=op: tuple(op(x, dim)), x)
    for op in (
        torch.amax,
        torch.amin,
        torch.argmax,
        torch.argmin,
        torch.sum,
        torch.nansum,
        torch.logsumexp,
        torch.softmax,
        torch.log_softmax,
    ):
        both(lambda x, op=op: op(x, dim), x)
    for op in (torch.cumsum, torch.cumprod, torch.logcumsumexp):
        both(lambda x, op=op: op(x, dim), x)


@pytest.mark.parametrize("p", [0, 1, 2, 3, 0.5, math.inf, -math.inf])
@given(x=filled(CELLS), dim=st.sampled_from([None, 0, (0, 2)]))
def test_norms(p: float, x: torch.Tensor, dim: Any) -> None:
    both(lambda x: torch.linalg.vector_norm(x, p, dim), x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.int64], ids=str)
def test_integers_sum_to_int64(dtype: torch.dtype) -> None:
    x = torch.full((70_000,), 200).to(dtype)
    both(torch.sum, x)
    both(lambda x: torch.cumsum(x, 0), x)
    both(lambda x: torch.prod(x[:9]), x)
    both(torch.count_nonzero, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_floats_accumulate_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((4096,), 0.1).to(dtype)
    both(torch.sum, x)
    both(torch.mean, x)
    both(lambda x: (x[:256, None] * x[None, :256]).sum(0), x)
    both(lambda x: x[:1024].reshape(1, -1) @ x[:1024].reshape(-1, 1), x)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    for op in (torch.sum, torch.prod, torch.mean, torch.any, torch.all, torch.count_nonzero):
        both(op, x)
    both(lambda x: x.sum(0), x)
    both(lambda x: x.cumsum(0), x)
    both(lambda x: torch.softmax(x, -1), x)
    for op in (torch.max, torch.argmax):
        with pytest.raises((RuntimeError, IndexError)):
            op(x)
        with pytest.raises((RuntimeError, IndexError)):
            op(x.to("jax"))


@pytest.mark.parametrize(
    "op", [torch.sum, torch.max, torch.argmax, torch.logsumexp, torch.cumsum, torch.softmax, torch.any]
)
@pytest.mark.parametrize("dim", [0, -1])
def test_zero_dimensional(op: Any, dim: int) -> None:
    x = torch.tensor(2.5)
    got, want = op(x.to("jax"), dim), op(x, dim)
    assert_same(tuple(got) if isinstance(want, tuple) else got, tuple(want) if isinstance(want, tuple) else want)


@pytest.mark.parametrize("correction", [0, 1, 2, 5, 0.5])
def test_variance_without_degrees_of_freedom(correction: float) -> None:
    x = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    both(lambda x: torch.var(x, 0, correction=correction), x)
    both(lambda x: torch.var_mean(x, correction=correction), x.to(torch.complex64))
