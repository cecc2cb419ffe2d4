"""Which calls of matrix products go to a kernel."""

from __future__ import annotations

from typing import Any

from torchax.ops import aten, lowering

from .conditions import DTYPES, Choice
from .settings import mode

# The kernels are imported where they are used: Pallas takes longer to import than all of torchax.
_GROUPED = aten._grouped_mm.default


def _unfit(x: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> str | None:
    """Why no kernel can serve a grouped product, whatever the platform; None if one can."""
    conditions = (
        (bias is None, lambda: "the kernels add no bias"),
        (
            offs is not None and x.ndim == 2 and mat2.ndim in (2, 3),
            lambda: f"a kernel splits rows of a 2-d operand by offs, operands have {x.ndim} and {mat2.ndim} dimensions",
        ),
        (
            x.dtype == mat2.dtype and x.dtype.name in DTYPES,
            lambda: f"dtypes must be one of {', '.join(DTYPES)}, they are {x.dtype}, {mat2.dtype}",
        ),
        (
            out_dtype is None or str(out_dtype) == f"torch.{x.dtype}",
            lambda: f"the result has the dtype of the operands, out_dtype is {out_dtype}",
        ),
        (0 not in (*x.shape, *mat2.shape, *offs.shape) if offs is not None else True, lambda: "an operand is empty"),
    )
    return next((words() for holds, words in conditions if not holds), None)


choice = Choice("_grouped_mm", _unfit, "a kernel for groups", "one for groups")


@lowering(_GROUPED, platforms=("tpu",), when=choice.on_tpu, priority=10, meta=False)
@lowering(_GROUPED, when=choice.interpreted, priority=9, meta=False)
def grouped_mm(x, mat2, offs=None, bias=None, out_dtype=None):
    """A product for each group of rows: XLA's kernel, and JAX's megablox for gradients."""
    from .grouped import grouped_matmul, grouped_outer

    if mat2.ndim == 3:
        return grouped_matmul(x, mat2, offs, mode() == "interpret")
    return grouped_outer(x.T, mat2, offs, mode() == "interpret")


REFUSALS = choice.refusals(_GROUPED, meta=False)
