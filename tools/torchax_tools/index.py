"""What `torchax-ops list` and shell completion need of the registry, kept in a file: reading it needs no torch.

It is made again when any module of a plugin or of torchax, a version, or ``TORCHAX_PLUGINS`` changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

FORMAT = 1  # of the file
KEEP = 8  # files


def folder() -> pathlib.Path:
    """Where files are kept: ``torchax`` in the user's folder for caches."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "torchax"


def _sources(package: str) -> Iterator[str]:
    """Each module of a package, with what changes when it does. The package is not imported."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)
        if spec is None:
            return
        places = list(spec.submodule_search_locations or ()) or ([spec.origin] if spec.origin else [])
        for place in places:
            path = pathlib.Path(place)
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                stat = file.stat()
                yield f"{file} {stat.st_mtime_ns} {stat.st_size}"


def fingerprint() -> str:
    """A digest of everything that decides what is registered."""
    digest = hashlib.sha256()
    entries = sorted(importlib.metadata.entry_points(group="torchax.plugins"), key=lambda e: (e.name, e.value))
    said: list[str] = [str(FORMAT), sys.version, sys.prefix, os.environ.get("TORCHAX_PLUGINS", "")]
    said += [f"{e.name}={e.value} {e.dist.name if e.dist else ''} {e.dist.version if e.dist else ''}" for e in entries]
    for name in ("torch", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            said.append(f"{name} {importlib.metadata.version(name)}")
    for package in dict.fromkeys(["torchax", *(e.value.split(":")[0].split(".")[0] for e in entries)]):
        said += _sources(package)
    for line in said:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:32]


def rows(fresh: bool = False) -> list[dict[str, Any]]:
    """Every lowering: ``op``, ``kind``, ``plugin``, ``family``, ``priority``, ``condition``; from the file if it is up to date.

    Args:
        fresh: load the plugins in any case.
    """
    path = folder() / f"lowerings-{fingerprint()}.json"
    if not fresh:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            if isinstance(found, list):
                return found
    made = _load()
    with contextlib.suppress(OSError):  # a folder that cannot be written to costs time, nothing else
        from .output import save

        path.parent.mkdir(parents=True, exist_ok=True)
        save(json.dumps(made), path)
        for old in sorted(path.parent.glob("lowerings-*.json"), key=lambda p: -p.stat().st_mtime)[KEEP:]:
            old.unlink(missing_ok=True)
    return made


def _load() -> list[dict[str, Any]]:
    import torchax  # noqa: F401  loads the plugins
    from torchax._registry import REGISTRY

    return [
        {
            "op": e.op,
            "kind": "whole" if e.whole else e.kind,
            "plugin": e.provider,
            "family": e.family,
            "priority": e.priority,
            "condition": e.conditions,
        }
        for op in REGISTRY.ops()
        for e in REGISTRY.lowerings(op)
    ]
