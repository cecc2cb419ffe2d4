"""torchax-ops-demo: a plugin of torchax, loaded through entry point ``demo``."""

from __future__ import annotations

from typing import Any

from torchax.hookspecs import hookimpl

from . import lowerings, ops

__version__ = "0.1.0"
__all__ = ["lowerings", "ops", "plugin"]


class Plugin:
    """The hooks that torchax calls."""

    @hookimpl
    def torchax_plugin_info(self) -> dict[str, Any]:
        """Who the plugin is, and which version of the plugin contract it was written for."""
        return {
            "name": "demo",
            "version": __version__,
            "api": "1.0",
            "summary": "RMS norm, and GELU in float16 on CPU",
            "url": "",
        }

    @hookimpl
    def torchax_register_ops(self, registry: Any) -> None:
        """Register every lowering of `lowerings`."""
        registry.collect(lowerings)

    @hookimpl
    def torchax_report_section(self, registry: Any) -> dict[str, Any]:
        """A section of ``torchax-ops coverage``: what this plugin serves, when, and who serves the rest."""
        rows = [
            {
                "op": entry.op,
                "served when": entry.conditions,
                "otherwise": ", ".join(e.provider for e in registry.lowerings(entry.op) if e is not entry) or "nobody",
            }
            for entry in registry.all()
            if entry.provider == "demo"
        ]
        return {"title": "What demo serves", "rows": rows}


plugin = Plugin()
