"""The coverage report as one HTML file that needs nothing else: search, filters, a heat map of families by dtypes."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "complex64", "complex128")


def page(report: dict[str, Any]) -> str:
    """The page for a report as `commands.coverage` makes it for ``--format json``."""
    found = {dtype for op in report["ops"] for by in op["parity"].values() for dtype in by} - {"-"}
    dtypes = [d for d in DTYPES if d in found] + sorted(found - set(DTYPES))
    data = json.dumps({**report, "dtypes": dtypes}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # nothing in it ends the script element
    template = (importlib.resources.files("torchax_tools") / "templates" / "coverage.html").read_text("utf-8")
    return template.replace("@DATA@", data)
