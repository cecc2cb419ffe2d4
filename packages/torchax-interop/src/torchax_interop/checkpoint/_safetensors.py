"""``.safetensors`` files, and the folders of shards with a ``model.safetensors.index.json`` that Hugging Face writes."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import struct
from typing import Any

import safetensors
import safetensors.torch
import torch
from torchax.errors import CheckpointError

from ._nest import Leaf, listed, rebuild
from ._read import Reader, reading, unreadable

SUFFIXES = (".safetensors",)
INDEX = ".safetensors.index.json"
_KEY = "torchax"
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64",
    "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def write(path: pathlib.Path, tree: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write CPU tensors and the description.

    Raises:
        CheckpointError: the format has no such dtype.
    """
    known = set(_DTYPES.values())
    wrong = [f"{n} ({t.dtype})" for n, t in tensors.items() if str(t.dtype).removeprefix("torch.") not in known]
    if wrong:
        raise CheckpointError(f"a .safetensors file cannot hold {listed(wrong)}; save to a .pt file or a folder")
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", _KEY: tree})


class SafetensorsReader(Reader):
    """One file, or the shards that an index names; each tensor, or a part of it, is read on its own."""

    def __init__(self, source: pathlib.Path):
        super().__init__(source)
        self._files = contextlib.ExitStack()
        self._where: dict[str, Any] = {}
        try:
            tree = self._open_index(source) if source.name.endswith(INDEX) else self._open(source)
        except BaseException:
            self.close()
            raise
        if tree is not None:
            with reading(source):
                self.state = rebuild(json.loads(tree))

    def _open(self, path: pathlib.Path) -> str | None:
        """Open one file; gives our description, if it has one."""
        try:
            file = self._files.enter_context(safetensors.safe_open(path, framework="pt"))
            metadata = file.metadata() or {}
            self.state = {name: _leaf(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except Exception as error:
            cut = cut_off(path)
            if cut:
                raise unreadable(str(path), cut[0], cut[1], error) from error
            with reading(path):
                raise
        self._where.update(dict.fromkeys(self.state, file))
        return metadata.get(_KEY)

    def _open_index(self, path: pathlib.Path) -> None:
        with reading(path):
            names = json.loads(path.read_text())["weight_map"]
            shards: dict[str, list[str]] = {}
            for name, shard in names.items():
                shards.setdefault(shard, []).append(name)
        state: dict[str, Leaf] = {}
        for shard, held in shards.items():
            file = path.parent / shard
            if pathlib.PurePath(shard).name != shard:
                raise CheckpointError(f"{path} names the shard {shard!r}, which is not a file beside it")
            if not file.exists():
                raise CheckpointError(f"{path} names the shard {shard}, which is missing; it holds {listed(held)}")
            self._open(file)
            missing = [name for name in held if name not in self.state]
            if missing:
                raise CheckpointError(f"{path} says that {shard} holds {listed(missing)}, which it does not")
            state.update({name: self.state[name] for name in held})
        self.state = {name: state[name] for name in names}

    def read(self, leaf: Leaf, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        file = self._where[leaf.name]
        return file.get_slice(leaf.name)[index] if index else file.get_tensor(leaf.name)

    def close(self) -> None:
        self._files.close()


def _leaf(name: str, view: Any) -> Leaf:
    dtype = view.get_dtype()
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {dtype}, which torch does not have")
    return Leaf(name, tuple(view.get_shape()), getattr(torch, _DTYPES[dtype]))


def cut_off(path: pathlib.Path) -> tuple[list[str], int] | None:
    """The tensors of a file that reach beyond its end, and how many it has in all; None where its header cannot be read."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                return None
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
        cut = [name for name, end in ends.items() if end > size and math.prod(header[name]["shape"])]
        return (cut, len(ends)) if cut else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
