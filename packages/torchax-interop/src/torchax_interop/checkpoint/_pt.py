"""``.pt`` files: what `torch.save` writes, read with ``weights_only=True``.

Ours are a plain dict of CPU tensors by name (so that `torch.load` and `Module.load_state_dict` take them without torchax);
the description of the nest is an attribute of that dict, as the versions in a ``state_dict`` are.
"""

from __future__ import annotations

import collections
import json
import pathlib
import pickletools
import struct
import zipfile
from typing import Any

import torch
from torchax.errors import CheckpointError

from ._nest import Leaf, describe, rebuild
from ._read import Reader, reading, unreadable

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_ATTRIBUTE = "_torchax"


def write(path: pathlib.Path, tree: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write CPU tensors and the description."""
    content = collections.OrderedDict(tensors)
    content.__dict__[_ATTRIBUTE] = tree
    torch.save(content, path)


class PtReader(Reader):
    """A ``.pt`` file; tensors are mapped into memory, and read from the disk when they are used."""

    def __init__(self, source: pathlib.Path):
        super().__init__(source)
        try:
            with reading(source):
                content = _load(source)
        except CheckpointError as error:
            names = names_of_damaged(source)
            if not names:
                raise
            raise unreadable(self.source, names, None, error.__cause__ or error) from error
        described = getattr(content, "__dict__", {}).get(_ATTRIBUTE)
        with reading(source):
            if described is not None:
                self.state, self._tensors = rebuild(json.loads(described)), content
            else:
                found = describe(content)
                self.state, self._tensors = rebuild(found.tree), found.tensors

    def read(self, leaf: Leaf, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        values = self._tensors[leaf.name]
        if not isinstance(values, torch.Tensor):
            values = torch.from_numpy(values)
        return values if index is None else values[index]


def _load(source: pathlib.Path) -> Any:
    if not zipfile.is_zipfile(source):  # torch's format before 1.6
        return torch.load(source, map_location="cpu", weights_only=True)
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(source, map_location="cpu", weights_only=True)


def names_of_damaged(source: pathlib.Path) -> list[str]:
    """The names of the tensors in a damaged file, as far as its first record, the pickle, can be made out. Runs nothing of it."""
    with open(source, "rb") as file:
        head = file.read(30)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            return []
        name, extra = struct.unpack("<HH", head[26:30])
        if not file.read(name).endswith(b"data.pkl"):
            return []
        file.seek(extra, 1)
        pickled = file.read(1 << 26)
    names: list[str] = []
    strings: list[Any] = []  # what was pushed, in order: strings and the names of globals
    memo: dict[Any, Any] = {}
    try:
        for op, arg, _ in pickletools.genops(pickled):
            if op.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "GLOBAL"):
                strings.append(arg)
            elif op.name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = strings[-1] if strings else None
            elif op.name in ("BINGET", "LONG_BINGET"):
                strings.append(memo.get(arg))
            elif op.name == "BINPERSID":
                at = _last_rebuild(strings)
                if at > 0 and isinstance(strings[at - 1], str):
                    names.append(strings[at - 1])
            elif op.name in (
                "EMPTY_TUPLE",
                "EMPTY_DICT",
                "EMPTY_LIST",
                "TUPLE",
                "TUPLE1",
                "TUPLE2",
                "TUPLE3",
                "REDUCE",
            ):
                strings.append(None)
    except Exception:  # cut off in the middle of the pickle: as far as it went
        pass
    return names


def _last_rebuild(strings: list[Any]) -> int:
    for i in range(len(strings) - 1, -1, -1):
        if isinstance(strings[i], str) and strings[i].startswith("torch._utils _rebuild_"):
            return i
    return -1
