"""Modules of the distribution torchax-interop under the names that users import: ``torchax.interop``, ``torchax.train`` and so on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def forwarding(name: str, target: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of the module `name`, whose names are those of `target`, loaded on first use."""

    def get(attribute: str) -> Any:
        if attribute.startswith("__") and attribute != "__all__":  # what Python asks every module must not load it
            raise AttributeError(attribute)
        module = _load(target)
        try:
            value = getattr(module, attribute)
        except AttributeError:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}") from None
        setattr(sys.modules[name], attribute, value)
        return value

    return get, lambda: sorted(_load(target).__all__)


def _load(target: str) -> Any:
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name != "torchax_interop":
            raise
        raise ImportError(
            "torchax.interop, torchax.compile and checkpoints are in the distribution torchax-interop, which is not "
            "installed: pip install torchax-interop"
        ) from None
