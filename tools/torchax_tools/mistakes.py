"""What is often wrong with an installation or its environment, and the remedy. Nothing here imports torch or jax."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import re
import sys

SHOWN = ("JAX_PLATFORMS", "XLA_FLAGS", "TORCHAX_PLUGINS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_X64")


def _line(what: str, state: str, detail: str, remedy: str = "") -> dict[str, str]:
    return {"what": what, "state": state, "detail": detail, "remedy": remedy}


def ranges(distribution: str) -> dict[str, str]:
    """The version ranges that a distribution asks for, by name; of required ones only."""
    try:
        asked = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for requirement in asked:
        match = re.match(r"([A-Za-z0-9._-]+)\s*([<>=!~][^;]*)?(;.*)?$", requirement)
        if match and "extra" not in (match[3] or ""):
            found[match[1]] = (match[2] or "").strip()
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def within(version: str, wanted: str) -> bool:
    """Whether a version lies within ``>=a,<b``; other conditions are taken to hold."""
    have = _numbers(version)
    for condition in filter(None, (part.strip() for part in wanted.split(","))):
        match = re.match(r"(>=|<=|==|<|>)\s*([0-9.]+)$", condition)
        if match is None:
            continue
        limit = _numbers(match[2])
        a, b = (t + (0,) * (3 - len(t)) for t in (have, limit))
        holds = {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b}[match[1]]
        if not holds:
            return False
    return True


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def of_installation() -> list[dict[str, str]]:
    """Distributions that get into each other's way."""
    lines = []
    owners = sorted(set(importlib.metadata.packages_distributions().get("torchax", [])) - {"torchax-core"})
    if owners:
        remedy = f"pip uninstall {' '.join(owners)}; pip install --force-reinstall torchax-core"
        lines.append(_line("package torchax", "wrong", f"{', '.join(owners)} brings files of its own", remedy))
    names: dict[str, list[str]] = {}
    for entry in importlib.metadata.entry_points(group="torchax.plugins"):
        names.setdefault(entry.name, []).append(entry.dist.name if entry.dist else "?")
    for name, brought in names.items():
        if len(set(brought)) > 1:
            remedy = f"uninstall all but one of {', '.join(sorted(set(brought)))}"
            lines.append(_line(f"plugin {name}", "wrong", "several distributions have a plugin of this name", remedy))
    if _installed("jax") and _installed("jaxlib"):
        jax, jaxlib = (importlib.metadata.version(n) for n in ("jax", "jaxlib"))
        if _numbers(jax)[:2] != _numbers(jaxlib)[:2]:
            lines.append(_line("jaxlib", "wrong", f"{jaxlib}, but jax is {jax}", f"pip install -U jaxlib=={jax}"))
    if sys.prefix == sys.base_prefix and os.path.exists(os.path.join(sys.prefix, "EXTERNALLY-MANAGED")):
        lines.append(_line("environment", "note", "this is the system's Python", "python3 -m venv .venv"))
    return lines


def of_environment(platform: str) -> list[dict[str, str]]:
    """Settings and devices that do not fit what was found.

    Args:
        platform: the one on which JAX computes.
    """
    lines = [_line(name, "note", os.environ[name]) for name in SHOWN if name in os.environ]
    known = {entry.name for entry in importlib.metadata.entry_points(group="torchax.plugins")}
    for part in filter(None, (p.strip() for p in os.environ.get("TORCHAX_PLUGINS", "").split(","))):
        if not part.startswith("-"):
            lines.append(
                _line("TORCHAX_PLUGINS", "wrong", f"{part!r} is ignored", "write -name to switch a plugin off")
            )
        elif part[1:] not in known:
            there = ", ".join(sorted(known)) or "none"
            lines.append(
                _line("TORCHAX_PLUGINS", "wrong", f"no plugin {part[1:]!r} is installed", f"there are: {there}")
            )
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true"):
        lines.append(
            _line(
                "JAX_ENABLE_X64", "note", "makes float64 the default of your own JAX code", "torchax does not need it"
            )
        )
    if platform == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        if glob.glob("/dev/nvidia[0-9]*"):
            lines.append(_line("GPU", "note", "there is one, and JAX does not use it", "pip install 'torchax[cuda]'"))
        if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
            lines.append(
                _line("TPU", "note", "there may be one, and JAX does not use it", "pip install 'torchax[tpu]'")
            )
    if platform == "tpu" and not _installed("torchax-ops-pallas"):
        lines.append(_line("TPU", "note", "without the Pallas kernels", "pip install 'torchax[pallas]'"))
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if folder and "://" not in folder and os.path.exists(folder) and not os.access(folder, os.W_OK):
        lines.append(
            _line("JAX_COMPILATION_CACHE_DIR", "wrong", f"{folder} cannot be written to", "name a folder of your own")
        )
    return lines
