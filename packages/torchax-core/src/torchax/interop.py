"""What lives in the distribution torchax-interop, under the name that users import: ``torchax.interop.jax_view`` and so on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._forwarding import forwarding

if TYPE_CHECKING:
    from torchax_interop import *  # noqa: F403

__getattr__, __dir__ = forwarding(__name__, "torchax_interop")
