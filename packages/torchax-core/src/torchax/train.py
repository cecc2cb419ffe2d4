"""Training steps out of a model, a loss and an optimizer: `torchax_interop.train`, under the name that users import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .interop import _load

if TYPE_CHECKING:
    from torchax_interop.train import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":  # what Python asks every module must not load it
        raise AttributeError(name)
    try:
        value = globals()[name] = getattr(_load("torchax_interop.train"), name)
    except AttributeError:
        raise AttributeError(f"module 'torchax.train' has no attribute {name!r}") from None
    return value


def __dir__() -> list[str]:
    return sorted(_load("torchax_interop.train").__all__)
