"""What lives in the distribution torchax-interop, under the name that users import: ``torchax.interop.jax_view`` and so on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchax_interop import *  # noqa: F403


def _load(name: str = "torchax_interop") -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "torchax_interop":
            raise
        raise ImportError(
            "torchax.interop, torchax.compile and checkpoints are in the distribution torchax-interop, which is not "
            "installed: pip install torchax-interop"
        ) from None


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":  # what Python asks every module must not load it
        raise AttributeError(name)
    module = _load()
    try:
        value = globals()[name] = getattr(module, name)
    except AttributeError:
        raise AttributeError(f"module 'torchax.interop' has no attribute {name!r}") from None
    return value


def __dir__() -> list[str]:
    return sorted(_load().__all__)
