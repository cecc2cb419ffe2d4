"""Several processes, and the data that each of them loads. It lives in the distribution torchax-interop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._forwarding import forwarding

if TYPE_CHECKING:
    from torchax_interop.distributed import *  # noqa: F403

__getattr__, __dir__ = forwarding(__name__, "torchax_interop.distributed")
