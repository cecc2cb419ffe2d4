"""Pallas kernels for torchax and the lowerings that choose them; loaded as a plugin through entry point ``pallas``."""

from __future__ import annotations

from typing import Any

import pluggy

hookimpl = pluggy.HookimplMarker("torchax")

__version__ = "0.1.0"


class PallasPlugin:
    """The plugin object of this distribution."""

    @hookimpl
    def torchax_plugin_info(self) -> dict[str, Any]:
        """Who the plugin is."""
        return {
            "name": "pallas",
            "version": __version__,
            "api": "1.0",
            "summary": "Pallas kernels for TPU",
            "url": "https://github.com/torchax/torchax",
        }

    @hookimpl
    def torchax_configure(self, config: Any) -> None:
        """Add the setting ``torchax.config.pallas``."""
        from . import settings

        settings.declare(config)

    @hookimpl
    def torchax_register_ops(self, registry: Any) -> None:
        """Add the lowerings that choose kernels."""
        from . import bands, dropout_lowerings, lowerings, matmul_lowerings, paged, ragged

        for module in (lowerings, dropout_lowerings, bands, paged, ragged, matmul_lowerings):
            registry.collect(module)


def __getattr__(name: str) -> Any:
    if name == "autotune":  # on first use: it loads Pallas, which takes longer to import than all of torchax
        from .tuning import autotune

        return autotune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


plugin = PallasPlugin()

# Last, since torchax looks for `plugin` while it is being imported.
import torchax  # noqa: E402, F401
