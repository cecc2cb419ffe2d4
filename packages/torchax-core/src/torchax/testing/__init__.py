"""What torchax tests its own lowerings with, for authors of plugins.

- `assert_parity`: an operator does on device jax what it does on CPU, in all its forms;
- `assert_aliasing`, `assert_same_aliases`: who shares memory with whom, and who writes what;
- `torchax.testing.strategies`: hypothesis strategies for tensors of any layout, dtype and value;
- `torchax.testing.opinfo`: tests made from PyTorch's own specification of the operators that a plugin lowers.

Nothing here is imported by ``import torchax``. hypothesis, pytest and expecttest are imported by the parts that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .aliasing import assert_aliasing, assert_same_aliases
from .cases import FORMS
from .compare import Mismatch
from .drafts import Draft
from .operators import Tolerance
from .parity import DEFAULT_FORMS, assert_parity
from .samples import Sample, sample

if TYPE_CHECKING:
    from . import opinfo, strategies

__all__ = [
    "DEFAULT_FORMS",
    "FORMS",
    "Draft",
    "Mismatch",
    "Sample",
    "Tolerance",
    "assert_aliasing",
    "assert_parity",
    "assert_same_aliases",
    "opinfo",
    "sample",
    "strategies",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in ("opinfo", "strategies"):
        raise AttributeError(f"module 'torchax.testing' has no attribute {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(f"torchax.testing.{name} needs {error.name}: pip install 'torchax[testing]'") from error
