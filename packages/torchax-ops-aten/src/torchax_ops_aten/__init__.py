"""Lowerings of ATen for torchax, one module per family; loaded as a plugin through entry point ``aten``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from torchax.hookspecs import hookimpl

__version__ = "0.1.0"

# families whose lowerings multiply matrices, in the precision that torch.set_float32_matmul_precision says
PRODUCTS = frozenset(
    {"attention", "conv", "distance", "grouped", "linear_cross_entropy", "matmul", "quantized", "rnn", "transformer"}
)


class AtenPlugin:
    """The plugin object of this distribution."""

    @hookimpl
    def torchax_plugin_info(self) -> dict[str, Any]:
        return {
            "name": "aten",
            "version": __version__,
            "api": "1.0",
            "summary": "lowerings of PyTorch's ATen operators",
            "url": "https://github.com/torchax/torchax",
        }

    @hookimpl
    def torchax_register_ops(self, registry: Any) -> None:
        for family in families():
            registry.collect(importlib.import_module(f"{__name__}.{family}"), products=family in PRODUCTS)
        importlib.import_module(f"{__name__}.linear_cross_entropy").install()


def families() -> list[str]:
    """Names of the modules that hold lowerings."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


plugin = AtenPlugin()
