"""A tensor written down: values, shape, dtype and layout, printed as the Python that makes it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

# layouts: code over a contiguous tensor `t`, and how the shape of `t` follows from the wanted one
LAYOUTS = {
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
        code, base = LAYOUTS[self.layout]
        base_shape = tuple(base(self.shape))
        t = f"torch.tensor([{values}], dtype={self.dtype}).resize_({math.prod(base_shape)}).reshape({base_shape})"
        return code.format(t=t, shape=self.shape)

    def make(self) -> torch.Tensor:
        """The tensor on CPU; elements beyond the drawn values repeat them."""
        code, base = LAYOUTS[self.layout]
        shape = tuple(base(self.shape))
        n = math.prod(shape)
        values = [self.values[i % len(self.values)] for i in range(n)] if self.values else []
        return eval(code.format(t="t", shape=self.shape), {"t": torch.tensor(values, dtype=self.dtype).reshape(shape)})
