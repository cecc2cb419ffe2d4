"""Folders written by orbax-checkpoint: every process writes the parts of arrays that it holds, and reads those that it needs."""

from __future__ import annotations

import logging
import pathlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import torch
from torchax import convert, dtypes

from ._nest import Leaf, listed, rebuild
from ._read import Place, Reader, check, reading

_VERSION = 1
_FORMAT = "torchax.checkpoint"
# a folder is complete once it has its name
ATOMIC = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.ATOMIC_RENAME)


def arguments(tree: Any, tensors: dict[str, Any]) -> Any:
    """What orbax is asked to save: arrays by name, and the description."""
    arrays = {name: x if isinstance(x, jax.Array) else _host(x) for name, x in tensors.items()}
    arrays = {name: x for name, x in arrays.items() if x.size}  # orbax has no empty ones; the description tells of them
    description = {"format": _FORMAT, "version": _VERSION, "tree": tree}
    return ocp.args.Composite(
        arrays=ocp.args.PyTreeSave(arrays or {"": np.zeros(1, np.int8)}), tree=ocp.args.JsonSave(description)
    )


def _host(x: Any) -> np.ndarray:
    return convert.host_values(x) if isinstance(x, torch.Tensor) else np.array(x)


def start(path: pathlib.Path, tree: Any, tensors: dict[str, Any]) -> Any:
    """Begin writing a new folder: when this returns, the values have been copied, and the writing goes on.

    Returns:
        orbax's checkpointer; `wait_until_finished` and `close` it.
    """
    with quiet(), jax.enable_x64(True):
        checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), atomicity_options=ATOMIC)
        try:
            checkpointer.save(path.absolute(), args=arguments(tree, tensors))
        except BaseException:
            checkpointer.close()
            raise
    return checkpointer


class FolderReader(Reader):
    """A folder; arrays are read together, each device's part by itself."""

    def __init__(self, source: pathlib.Path):
        super().__init__(source)
        self._path = source.absolute()
        with reading(source), quiet():
            if not (self._path / "tree").is_dir():
                names = sorted(entry.name for entry in self._path.iterdir())
                holds = f"it holds {listed(names, most=5)}" if names else "it is empty"
                raise ValueError(f"no folder that save_checkpoint wrote, and no model.safetensors is in it: {holds}")
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                found = checkpointer.restore(self._path, args=ocp.args.Composite(tree=ocp.args.JsonRestore()))
            if found.tree["format"] != _FORMAT or found.tree["version"] > _VERSION:
                raise ValueError(f"its format is {found.tree['format']} {found.tree['version']}")
            self.state = rebuild(found.tree["tree"])

    def _restore(self, places: list[tuple[Leaf, Place]]) -> dict[str, Any]:
        wanted = {leaf.name: _restore_args(leaf, place) for leaf, place in places if 0 not in leaf.shape}
        if not wanted:
            return {}
        with quiet(), jax.enable_x64(True), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(item=dict.fromkeys(wanted, 0), restore_args=wanted, partial_restore=True)
            return checkpointer.restore(self._path / "arrays", args=args)

    def read(self, leaf: Leaf, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        if 0 in leaf.shape:
            return torch.empty(leaf.shape, dtype=leaf.dtype)
        values = convert.to_torch(self._restore([(leaf, None)])[leaf.name])
        return values if index is None else values[index]

    def put_all(self, places: list[tuple[Leaf, Place]]) -> list[Any]:
        try:
            arrays = self._restore(places)
            return [self._finish(leaf, place, arrays.get(leaf.name)) for leaf, place in places]
        except Exception:
            return super().put_all(places)  # one by one, to tell which

    def put(self, leaf: Leaf, place: Place) -> Any:
        return self._finish(leaf, place, self._restore([(leaf, place)]).get(leaf.name))

    def _finish(self, leaf: Leaf, place: Place, value: Any) -> Any:
        if value is None:
            return super().put(leaf, place)
        check(leaf, value)
        if isinstance(value, jax.Array):
            return value
        return convert.to_torch(value) if place is None else convert.on_device(value, place)


def _restore_args(leaf: Leaf, place: Place) -> Any:
    dtype = dtypes.to_jax(leaf.cast) if leaf.cast else None
    if isinstance(place, jax.sharding.Sharding):
        return ocp.ArrayRestoreArgs(sharding=place, dtype=dtype)
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)


_quiet = threading.Lock()
_depth = 0


@contextmanager
def quiet() -> Iterator[None]:
    """Without orbax's remarks on files that our folders do not have; its errors are raised."""
    global _depth
    logger = logging.getLogger("absl")
    with _quiet:
        _depth += 1
        if _depth == 1:
            logger.addFilter(_remark)
    try:
        yield
    finally:
        with _quiet:
            _depth -= 1
            if _depth == 0:
                logger.removeFilter(_remark)


def _remark(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING
