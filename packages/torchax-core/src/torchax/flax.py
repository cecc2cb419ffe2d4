"""flax and torch modules inside of each other: `torchax_interop.flax`, under the name that users import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .interop import _load

if TYPE_CHECKING:
    from torchax_interop.flax import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":  # what Python asks every module must not load it
        raise AttributeError(name)
    try:
        value = globals()[name] = getattr(_load("torchax_interop.flax"), name)
    except AttributeError:
        raise AttributeError(f"module 'torchax.flax' has no attribute {name!r}") from None
    return value


def __dir__() -> list[str]:
    return sorted(_load("torchax_interop.flax").__all__)
