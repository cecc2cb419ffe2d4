"""Hypothesis strategies for tensors as PyTorch users make them: any layout, any dtype, values at the edges.

What they draw is a `Draft`, whose repr is Python that makes the tensor again, so that a failure can be pasted.
Needs hypothesis (``pip install 'torchax[testing]'``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st

from .drafts import LAYOUTS, Draft

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = (*FLOATS, *INTS, torch.bool, *COMPLEX)


def shapes(max_dims: int = 3, max_side: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """0-d and 0-size ones included."""
    return st.lists(st.integers(0, max_side), max_size=max_dims).map(tuple)


@st.composite
def broadcast_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast."""
    shape = draw(shapes())

    def part() -> tuple[int, ...]:
        kept = shape[draw(st.integers(0, len(shape))) :]
        return tuple(draw(st.sampled_from((n, 1))) for n in kept)

    return part(), part()


def values(dtype: torch.dtype) -> st.SearchStrategy[Any]:
    """Numbers of `dtype`: small ones, its limits, NaN and infinities."""
    if dtype == torch.bool:
        return st.booleans()
    if dtype.is_complex:  # what infinities and NaN give in complex arithmetic is nowhere defined
        return small(dtype)
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        edges = [0.0, -0.0, 1.0, -1.0, 0.5, info.max, info.min, info.tiny, info.eps, math.inf, -math.inf, math.nan]
        return st.sampled_from(edges) | st.integers(-64, 64).map(lambda i: i / 8)
    info = torch.iinfo(dtype)
    return st.sampled_from([0, 1, info.max, info.min, info.max - 1]) | st.integers(max(info.min, -9), 9)


def small(dtype: torch.dtype) -> st.SearchStrategy[Any]:
    """Numbers of `dtype` that every dtype of its kind, and their sums, can hold."""
    if dtype == torch.bool:
        return st.booleans()
    if dtype.is_complex:
        return st.builds(complex, small(torch.float32), small(torch.float32))
    return st.integers(-8, 8).map(lambda i: i / 4) if dtype.is_floating_point else st.integers(0, 3)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | tuple[int, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    elements: Any = values,
) -> Draft:
    """A tensor of any layout that its shape allows."""
    if shape is None:
        shape = shapes()
    shape = shape if isinstance(shape, tuple) else draw(shape)
    dtype = draw(st.sampled_from(dtypes))
    fitting = [
        name
        for name in LAYOUTS
        if not (name == "expanded" and not shape)
        and not (name == "overlapping" and (len(shape) != 2 or not math.prod(shape)))
        and not (name in ("transposed", "permuted") and len(shape) < 2)
        and not (name in ("stepped", "sliced") and not shape)
    ]
    layout = draw(st.sampled_from(fitting))
    size = math.prod(LAYOUTS[layout][1](shape))
    drawn = draw(st.lists(elements(dtype), min_size=min(size, 1), max_size=min(size, 8)))
    return Draft(tuple(drawn), shape, dtype, layout)


def numbers() -> st.SearchStrategy[Any]:
    """Python numbers as operators take them: bools, ints and floats at the limits of dtypes."""
    limits = [torch.iinfo(d) for d in (torch.int8, torch.uint8, torch.int32, torch.int64)]
    ints = [0, 1, -1, 2, 3] + [x for i in limits for x in (i.max, i.min)]
    floats = [0.0, -0.0, 0.5, -1.5, 1e-8, 3.4e38, 1e39, math.inf, -math.inf, math.nan]
    return st.sampled_from([True, False, *ints, *floats])
