"""Several processes, and the data that each of them loads. It lives in the distribution torchax-interop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchax_interop.distributed import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    from .interop import _load

    _load()
    import torchax_interop.distributed as module

    try:
        return getattr(module, name)
    except AttributeError:
        raise AttributeError(f"module 'torchax.distributed' has no attribute {name!r}") from None
