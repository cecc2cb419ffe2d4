"""Hypothesis strategies for tensors as PyTorch users make them: any layout, any dtype, values at the edges.

What they draw is a `Draft`, whose repr is Python that makes the tensor again, so that a failure can be pasted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = (*FLOATS, *INTS, torch.bool, *COMPLEX)

# layouts: code over a contiguous tensor `t`, and how the shape of `t` follows from the wanted one
_LAYOUTS = {
    "contiguous": ("{t}", lambda shape: shape),
    "transposed": ("{t}.transpose(0, -1)", lambda shape: (shape[-1], *shape[1:-1], shape[0]) if len(shape) > 1 else shape),
    "stepped": ("{t}[..., ::2]", lambda shape: (*shape[:-1], 2 * shape[-1]) if shape else shape),
    "sliced": ("{t}[..., 1:]", lambda shape: (*shape[:-1], shape[-1] + 1) if shape else shape),
    "expanded": ("{t}.expand({shape})", lambda shape: (1, *shape[1:])),
    "permuted": ("{t}.movedim(0, -1)", lambda shape: (shape[-1], *shape[:-1]) if shape else shape),
    "overlapping": ("{t}.unfold(0, {shape[1]}, 1)", lambda shape: (shape[0] + shape[1] - 1,)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Draft:
    """A tensor to be: a flat list of values, a shape, a dtype and a layout."""

    values: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"

    def __repr__(self) -> str:
        values = ", ".join(
            f"float({str(v)!r})" if isinstance(v, float) and not math.isfinite(v) else repr(v) for v in self.values
        )
        code, base = _LAYOUTS[self.layout]
        base_shape = tuple(base(self.shape))
        t = f"torch.tensor([{values}], dtype={self.dtype}).resize_({math.prod(base_shape)}).reshape({base_shape})"
        return code.format(t=t, shape=self.shape)

    def make(self) -> torch.Tensor:
        """The tensor on CPU; elements beyond the drawn values repeat them."""
        code, base = _LAYOUTS[self.layout]
        shape = tuple(base(self.shape))
        n = math.prod(shape)
        values = [self.values[i % len(self.values)] for i in range(n)] if self.values else []
        return eval(code.format(t="t", shape=self.shape), {"t": torch.tensor(values, dtype=self.dtype).reshape(shape)})


def twin(t: torch.Tensor) -> torch.Tensor:
    """`t` on device jax, over a storage of its own with the same strides and offset."""
    size = (
        t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    )
    flat = torch.as_strided(t, (size,), (1,), 0).clone() if size else t.new_empty(0)
    return flat.to("jax").as_strided(t.shape, t.stride(), t.storage_offset() if size else 0)


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
        for name in _LAYOUTS
        if not (name == "expanded" and not shape)
        and not (name == "overlapping" and (len(shape) != 2 or not math.prod(shape)))
        and not (name in ("transposed", "permuted") and len(shape) < 2)
        and not (name in ("stepped", "sliced") and not shape)
    ]
    layout = draw(st.sampled_from(fitting))
    size = math.prod(_LAYOUTS[layout][1](shape))
    drawn = draw(st.lists(elements(dtype), min_size=min(size, 1), max_size=min(size, 8)))
    return Draft(tuple(drawn), shape, dtype, layout)


def numbers() -> st.SearchStrategy[Any]:
    """Python numbers as operators take them: bools, ints and floats at the limits of dtypes."""
    limits = [torch.iinfo(d) for d in (torch.int8, torch.uint8, torch.int32, torch.int64)]
    ints = [0, 1, -1, 2, 3] + [x for i in limits for x in (i.max, i.min)]
    floats = [0.0, -0.0, 0.5, -1.5, 1e-8, 3.4e38, 1e39, math.inf, -math.inf, math.nan]
    return st.sampled_from([True, False, *ints, *floats])
