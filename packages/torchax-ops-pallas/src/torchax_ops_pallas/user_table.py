"""Block sizes that `autotune` found on this user's TPUs, in a file that look-ups ask before the tables of the package."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import threading
import warnings
from typing import Any

from .settings import table_path

FORMAT = 1  # of the file
_KEY = ("kind", "kernel", "sizes", "dtype")
_lock = threading.Lock()
_read: dict[str, tuple[Any, dict[Any, dict[str, int]]]] = {}  # by path: what the file was, and what it says


def bucket(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a call as they are looked up: each rounded up to a power of two."""
    return tuple(1 << (n - 1).bit_length() if n > 0 else 0 for n in sizes)


def find(kind: str, kernel: str, sizes: tuple[int, ...], dtype: str) -> dict[str, int] | None:
    """The block sizes that were found for a call, or None.

    Args:
        kind: the TPU's `device_kind`.
        kernel: a kernel's name, a key of `tuning.KERNELS`.
        sizes: the call's sizes, in the order of that kernel.
        dtype: of the operands.
    """
    return _entries(table_path()).get((kind, kernel, bucket(sizes), dtype))


def _entries(path: pathlib.Path) -> dict[Any, dict[str, int]]:
    try:
        stat = path.stat()
    except OSError:
        return {}
    stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    with _lock:
        known = _read.get(str(path))
        if known is not None and known[0] == stamp:
            return known[1]
        try:
            entries = {_key(entry): entry["blocks"] for entry in load(path)}
        except (OSError, ValueError) as error:
            entries = {}
            warnings.warn(
                f"{path}: not a table of block sizes, and ignored ({error}); delete it, or write it anew with torchax-ops tune",
                stacklevel=2,
            )
        _read[str(path)] = (stamp, entries)
        return entries


def _key(entry: dict[str, Any]) -> Any:
    return entry["kind"], entry["kernel"], tuple(entry["sizes"]), entry["dtype"]


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of a file: ``kind``, ``kernel``, ``sizes``, ``dtype``, ``blocks``, ``seconds``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file; says what is wrong.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("entries"), list):
        raise ValueError(f'expected an object with "format": {FORMAT} and a list of "entries"')
    for i, entry in enumerate(found["entries"]):
        if not isinstance(entry, dict) or not all(name in entry for name in (*_KEY, "blocks")):
            raise ValueError(f"entry {i} must have {', '.join(_KEY)} and blocks")
        blocks = entry["blocks"]
        if not isinstance(entry["sizes"], list) or not isinstance(blocks, dict) or not blocks:
            raise ValueError(f"entry {i} must have a list of sizes and an object of blocks")
        if not all(type(n) is int and n > 0 and n % 128 == 0 for n in blocks.values()):
            raise ValueError(f"entry {i}: blocks must be multiples of 128, they are {blocks}")
    return found["entries"]


def save(
    kind: str, kernel: str, sizes: tuple[int, ...], dtype: str, blocks: dict[str, int], seconds: float
) -> pathlib.Path:
    """Add an entry to the user's file, in place of an earlier one for the same call; whole or not at all.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
        ValueError: what is there is no table of block sizes; it is left as it is.
    """
    path = table_path()
    entry = {"kind": kind, "kernel": kernel, "sizes": list(bucket(sizes)), "dtype": dtype, "blocks": blocks}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock:
        kept = [e for e in load(path) if _key(e) != _key(entry)] if path.exists() else []
        text = json.dumps({"format": FORMAT, "entries": [*kept, {**entry, "seconds": seconds}]}, indent=1) + "\n"
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            pathlib.Path(temporary).unlink(missing_ok=True)
            raise
    return path
