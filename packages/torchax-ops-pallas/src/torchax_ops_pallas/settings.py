"""The settings ``torchax.config.pallas``, whether kernels are used, and ``pallas_table``, where the user's block sizes are."""

from __future__ import annotations

import os
import pathlib
from typing import Any

NAME = "pallas"
TABLE = "pallas_table"
CHOICES = ("auto", "off", "interpret", "required")


def declare(config: Any) -> None:
    """Add the settings; a change of one has every call choose anew."""
    if NAME in config.options():
        return
    config.declare(
        NAME,
        "auto",
        choices=CHOICES,
        doc="kernels: 'auto' on TPU and GPU where one fits the call, 'off' never, 'interpret' also on this machine, as plain JAX "
        "operations (slow; for tests), 'required' raises where none can be used and says why",
    )
    config.declare(
        TABLE,
        None,
        doc="file with the block sizes that 'torchax-ops tune' found on this user's TPUs; None for what TORCHAX_PALLAS_TABLE says, "
        "or else pallas-blocks.json in the user's cache folder for torchax",
    )
    for name in (NAME, TABLE):
        config.on_change(name, _choose_anew)


def _choose_anew(_value: Any) -> None:
    from torchax.ops import REGISTRY

    REGISTRY.changed()


def mode() -> str:
    """The setting's value."""
    from torchax.config import config

    return getattr(config, NAME)


def table_path() -> pathlib.Path:
    """The user's file of block sizes, which need not exist."""
    from torchax.config import config

    chosen = getattr(config, TABLE) or os.environ.get("TORCHAX_PALLAS_TABLE")
    if chosen:
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "torchax" / "pallas-blocks.json"
