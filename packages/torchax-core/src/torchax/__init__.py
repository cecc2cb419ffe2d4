"""torchax: PyTorch programs on JAX.

Importing it makes device ``"jax"`` known to PyTorch::

    import torch, torchax
    x = torch.randn(4, 784, device="jax")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _backend, _control_flow, _operators, errors
from ._execute import strict as _strict  # noqa: F401 (it makes itself the executor)
from .config import config
from .tensor import Tensor

_backend.install()
_operators.install()
_control_flow.install()

from . import amp, convert, debug, device, dtypes, hookspecs, ops, plugins, random  # noqa: E402
from .convert import from_dlpack  # noqa: E402
from .environment import (  # noqa: E402
    default_env,
    disable_globally,
    enable_accuracy_mode,
    enable_globally,
    enable_performance_mode,
)
from .random import Generator  # noqa: E402

plugins.on_load.append(_backend.register_kernels)
plugins.load_entry_points()

__version__ = "0.1.0"

# Names that live in torchax-interop, loaded on first use.
_INTEROP = ("CompileOptions", "compile", "extract_jax", "load_checkpoint", "save_checkpoint")
_MODULES = ("distributed", "export", "flax", "interop", "mesh_util", "train", "view")


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"torchax.{name}")
    if name in _INTEROP:
        return getattr(importlib.import_module("torchax.interop"), name)
    raise AttributeError(f"module 'torchax' has no attribute {name!r}")


if TYPE_CHECKING:
    from . import distributed, export, interop, mesh_util, view
    from .interop import CompileOptions, compile, extract_jax, load_checkpoint, save_checkpoint

__all__ = [
    "CompileOptions", "Generator", "Tensor", "amp", "compile", "config", "convert", "debug", "default_env", "device", "disable_globally",
    "distributed", "dtypes", "enable_accuracy_mode", "enable_globally", "enable_performance_mode", "errors", "export",
    "extract_jax", "from_dlpack", "hookspecs", "interop", "load_checkpoint", "mesh_util", "ops", "plugins", "random",
    "save_checkpoint", "view",
]  # fmt: skip
