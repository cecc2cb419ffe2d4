"""The setting ``torchax.config.pallas``: whether kernels are used."""

from __future__ import annotations

from typing import Any

NAME = "pallas"
CHOICES = ("auto", "off", "interpret", "required")


def declare(config: Any) -> None:
    """Add the setting; a change of it has every call choose anew."""
    if NAME in config.options():
        return
    config.declare(
        NAME,
        "auto",
        choices=CHOICES,
        doc="kernels: 'auto' on TPU and GPU where one fits the call, 'off' never, 'interpret' also on this machine, as plain JAX "
        "operations (slow; for tests), 'required' raises where none can be used and says why",
    )
    config.on_change(NAME, _choose_anew)


def _choose_anew(_value: str) -> None:
    from torchax.ops import REGISTRY

    REGISTRY.changed()


def mode() -> str:
    """The setting's value."""
    from torchax.config import config

    return getattr(config, NAME)
