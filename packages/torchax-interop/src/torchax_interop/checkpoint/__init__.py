"""`save_checkpoint`, `load_checkpoint`, `open_checkpoint` and `CheckpointManager`.

Three formats, chosen by the path's ending: ``.pt`` (`_pt`), ``.safetensors`` (`_safetensors`), and folders of orbax-checkpoint
(`_folder`). In each, a nest of values is named tensors and a description (`_nest`). Files and folders appear at once (`_atomic`).
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import torch
from jax.core import Tracer
from torchax import convert
from torchax.errors import CheckpointError

from .. import _atomic
from . import _folder, _pt, _safetensors
from ._nest import Leaf, describe, fit, leaves, listed, replace
from ._read import Reader, Shardings, check_shardings, finish, place_of
from ._saving import Saving, settle

Path = str | os.PathLike[str]
_FILES = {**dict.fromkeys(_pt.SUFFIXES, _pt), **dict.fromkeys(_safetensors.SUFFIXES, _safetensors)}
_folders = itertools.count()


def save_checkpoint(state: Any, path: Path, step: int | None = None, *, wait: bool = True) -> Saving | None:
    """Write a nest of values.

    The previous checkpoint at the path stays whole until the new one is complete, also if the process is killed.

    Args:
        state: dicts, lists, tuples, named tuples (optax states) and registered pytrees of tensors, Parameters, `jax.Array`s,
            numpy arrays, numbers, strings, bytes, dtypes, None. A module stands for its ``state_dict()``.
        path: ``.safetensors``, or ``.pt`` (``.pth``, ``.bin``, ``.ckpt``): a file. Else a folder, written by orbax-checkpoint,
            each process the parts of arrays that it holds.
        step: number of the checkpoint: it is written as ``PATH/STEP`` (a folder), or ``NAME-STEP.pt``.
        wait: False gives control back as soon as the values have been copied; the writing goes on in the background. The
            values saved are those at the time of the call.

    Returns:
        None, or with ``wait=False`` a `Saving` to wait for. Another save or load of the same path, and the end of the program,
        wait for it.

    Raises:
        CheckpointError: a value cannot be saved; names it. Nothing has been written then.
        OSError: the disk is full, and the like. The previous checkpoint is as it was.
    """
    target = _at_step(_local(path), step).absolute()
    described = describe(state)
    settle(target)
    if jax.process_index() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        _atomic.clear(target)
    if target.suffix in _FILES:
        module, tree = _FILES[target.suffix], json.dumps(described.tree)
        tensors = _on_host(described.tensors)
        run = lambda: _atomic.write_file(target, lambda file: module.write(file, tree, tensors))
    else:
        checkpointer, new = _start_folder(target, described.tree, described.tensors)
        run = lambda: _finish_folder(checkpointer, new, target)
    if not wait:
        return Saving(target, run)
    run()
    return None


def load_checkpoint(
    path: Path,
    target: Any = None,
    step: int | None = None,
    *,
    sharding: Shardings = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Read a checkpoint: what `save_checkpoint` wrote, other ``.pt`` and ``.safetensors`` files, shards of Hugging Face.

    Each tensor is read by itself and goes straight to its place; with a sharding, each device reads its part. No code from the
    file is run. Tensors that were on device ``jax`` come back there, arrays as `jax.Array`s. Named tuples come back as such
    where their class is loaded in this process, or where `target` has them. `Module.load_state_dict` takes what comes back.

    Args:
        path: as for `save_checkpoint`; of several steps the latest is read. ``NAME.safetensors.index.json``, or a folder with
            one, reads the shards that it names.
        target: a nest of the same structure (a module stands for its ``state_dict()``): gives the containers, the kind of
            value (tensor, `jax.Array`, numpy), and where each is put; its values are not used, so meta tensors and
            `jax.ShapeDtypeStruct`s will do. Keys, shapes and dtypes must be the checkpoint's.
        step: which step to read.
        sharding: a `jax.sharding.Sharding` for all tensors, a mapping from names (``"model.0.weight"``), or a function
            ``(name, shape) -> Sharding | None``.
        device: where tensors go for which no sharding is given: ``"jax"``, ``"cpu"``.
        dtype: floating tensors are cast to it while they are read.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint, or it does not fit `target`; names the tensors.
    """
    reader = _open(path, step)
    try:
        state = reader.state
        if dtype is not None:
            for leaf in leaves(state):
                leaf.cast = dtype if leaf.dtype.is_floating_point and leaf.dtype != dtype else None
        if target is not None:
            state = fit(state, target, reader.source)
        return _materialize(reader, state, sharding, device)
    finally:
        reader.close()


class LazyCheckpoint(Mapping[str, Any]):
    """The tensors of a checkpoint by name, each read when it is asked for. A context manager; `close` gives the files back.

    Attributes:
        shapes: shape of every tensor.
        dtypes: dtype of every tensor, as it will be read.
    """

    def __init__(self, reader: Reader, options: tuple[Shardings, Any], dtype: torch.dtype | None):
        self._reader, self._options = reader, options
        self._leaves = {leaf.name: leaf for leaf in leaves(reader.state)}
        for leaf in self._leaves.values():
            leaf.cast = dtype if dtype and leaf.dtype.is_floating_point and leaf.dtype != dtype else None
        self.shapes = {name: leaf.shape for name, leaf in self._leaves.items()}
        self.dtypes = {name: leaf.cast or leaf.dtype for name, leaf in self._leaves.items()}

    def __getitem__(self, name: str) -> Any:
        return _materialize(self._reader, self._leaves[name], *self._options)

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def __repr__(self) -> str:
        tensors = [f"{name}: {tuple(self.shapes[name])} {self.dtypes[name]}" for name in self]
        return listed([f"<LazyCheckpoint {self._reader.source}, {len(self)} tensors", *tensors], "\n  ", most=9) + ">"

    def close(self) -> None:
        """Give the files back."""
        self._reader.close()

    def __enter__(self) -> LazyCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_checkpoint(
    path: Path,
    step: int | None = None,
    *,
    sharding: Shardings = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LazyCheckpoint:
    """A checkpoint as a mapping from names to tensors, each read when it is asked for. The arguments are `load_checkpoint`'s.

    Raises:
        CheckpointError: missing, damaged or not a checkpoint.
    """
    return LazyCheckpoint(_open(path, step), (sharding, device), dtype)


# ---------------------------------------------------------------------- reading
def _open(path: Path, step: int | None) -> Reader:
    source = _find(_local(path).absolute(), step)
    if source.is_dir():
        index = sorted(source.glob(f"*{_safetensors.INDEX}"))
        single = source / "model.safetensors"
        if index or single.exists():
            return _safetensors.SafetensorsReader(index[0] if index else single)
        return _folder.FolderReader(source)
    if source.name.endswith(_safetensors.INDEX) or source.suffix in _safetensors.SUFFIXES:
        return _safetensors.SafetensorsReader(source)
    return _pt.PtReader(source)


def _materialize(reader: Reader, state: Any, sharding: Shardings, device: torch.device | str | None) -> Any:
    device = torch.device(device) if isinstance(device, str) else device
    if device is not None and device.type not in ("jax", "cpu"):
        raise ValueError(f"device must be 'jax' or 'cpu'; got {str(device)!r}")
    found = leaves(state)
    places = [(leaf, place_of(leaf, sharding, device)) for leaf in found]
    check_shardings(places)
    values = reader.put_all(places)
    return replace(state, {id(leaf): finish(leaf, value) for leaf, value in zip(found, values, strict=True)})


# ---------------------------------------------------------------------- writing
def _on_host(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    copies: dict[str, torch.Tensor] = {}
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor):
            copies[name] = x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            continue
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            raise CheckpointError(
                f"{name} lies on devices of several processes; save to a folder (a path without an ending)"
            )
        copies[name] = convert.to_torch(convert.host_array(x, f"saving {name}"))
    return copies


def _start_folder(target: pathlib.Path, tree: Any, tensors: dict[str, Any]) -> tuple[Any, pathlib.Path]:
    new = _atomic.draft(target)
    if jax.process_count() > 1:  # the same name in all processes
        new = target.with_name(f".{target.name}.draft-all-{next(_folders)}")
    for name, x in tensors.items():
        if isinstance(x, Tracer):
            convert.host_array(x, f"saving {name}")
    return _folder.start(new, tree, tensors), new


def _finish_folder(checkpointer: Any, new: pathlib.Path, target: pathlib.Path) -> None:
    with _folder.quiet():
        try:
            checkpointer.wait_until_finished()
        finally:
            checkpointer.close()
    if jax.process_index() == 0:
        _atomic.replace_folder(new, target)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"torchax checkpoint {new.name}")


# ---------------------------------------------------------------------- paths
def _local(path: Path) -> pathlib.Path:
    if "://" in os.fspath(path):
        raise CheckpointError(
            f"{path} is not a path of the file system; mount the storage and name a path below the mount"
        )
    return pathlib.Path(path)


def _at_step(path: pathlib.Path, step: int | None) -> pathlib.Path:
    if step is None:
        return path
    return path.with_name(f"{path.stem}-{step}{path.suffix}") if path.suffix in _FILES else path / str(step)


def _find(path: pathlib.Path, step: int | None) -> pathlib.Path:
    found = _at_step(path, step)
    settle(found)
    found = _atomic.standing(found)
    if step is None and found.is_dir():
        steps = [int(p.name) for p in found.iterdir() if re.fullmatch(r"\d+", p.name) and p.is_dir()]
        if steps:
            return _find(path, max(steps))
    if step is None and not found.exists() and path.suffix in _FILES and path.parent.is_dir():
        pattern = re.compile(re.escape(path.stem) + r"-(\d+)" + re.escape(path.suffix))
        steps = [int(m[1]) for p in path.parent.iterdir() if (m := pattern.fullmatch(p.name))]
        if steps:
            return _find(path, max(steps))
    if not found.exists():
        raise CheckpointError(f"there is no checkpoint at {found}")
    return found


from ._manager import CheckpointManager  # noqa: E402 (it saves and loads by the functions above)

__all__ = [
    "CheckpointManager", "LazyCheckpoint", "Leaf", "Saving", "load_checkpoint", "open_checkpoint", "save_checkpoint",
]  # fmt: skip
