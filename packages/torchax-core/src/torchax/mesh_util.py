"""Meshes that hold a rule for sharding. It lives in the distribution torchax-interop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchax_interop.mesh_util import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    from .interop import _load

    _load()
    import torchax_interop.mesh_util as module

    try:
        return getattr(module, name)
    except AttributeError:
        raise AttributeError(f"module 'torchax.mesh_util' has no attribute {name!r}") from None
