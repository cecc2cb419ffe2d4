"""What authors of op plugins import: the decorators and records that describe lowerings.

`mappings` and `jtorch` keep the names that existing users of torchax import.
"""

import torch

from .._checks import raise_if
from .._registry import REGISTRY, Lowering, lowering, op_name, stateful, table, view_lowering
from .._sharding import batch_axes, batch_parts, divided

aten = torch.ops.aten

__all__ = [
    "REGISTRY", "Lowering", "aten", "batch_axes", "batch_parts", "divided", "lowering", "op_name", "raise_if", "stateful", "table",
    "view_lowering",
]  # fmt: skip
