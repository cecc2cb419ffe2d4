"""The hooks of a torchax plugin. Entry-point group ``torchax.plugins``; all hooks are called with keyword arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from ._registry import Registry
    from .config import Config

hookspec = pluggy.HookspecMarker("torchax")
hookimpl = pluggy.HookimplMarker("torchax")


@hookspec
def torchax_plugin_info() -> dict[str, Any]:  # type: ignore[empty-body]
    """Who the plugin is.

    Returns:
        ``name``, ``version``, ``api`` (the core API version it was written for, ``"1.0"``), ``summary`` (one line)
        and ``url``.
    """


@hookspec
def torchax_register_ops(registry: Registry) -> None:
    """Add lowerings: ``registry.collect(module)`` or ``registry.add(Lowering(...))``."""


@hookspec
def torchax_configure(config: Config) -> None:
    """Read or declare options, ``config.declare("pallas", "auto", choices=(...))``. Called before ops are registered."""


@hookspec
def torchax_report_section(registry: Registry) -> dict[str, Any]:  # type: ignore[empty-body]
    """An extra section of the coverage report: ``title`` and ``rows`` (a list of flat dicts)."""
