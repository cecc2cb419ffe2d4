"""`save_checkpoint`, `load_checkpoint`: nests of tensors, arrays and plain values, written so that a crash leaves the old file.

A ``.pt`` file holds CPU tensors and a description of the nest; it is read with ``weights_only=True``, so loading runs
no code from the file. A path without such an ending is a folder written by orbax-checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
from torchax import convert
from torchax.errors import CheckpointError
from torchax.tensor import Tensor

from ._tree import flatten, unflatten

_FORMAT, _VERSION = "torchax.checkpoint", 1
_FILES = (".pt", ".pth", ".bin", ".ckpt")
Path = str | os.PathLike[str]


def save_checkpoint(state: Any, path: Path, step: int | None = None) -> None:
    """Write a nest of values.

    The previous checkpoint at the path stays whole until the new one is complete.

    Args:
        state: dicts, lists, tuples and named tuples (optax states) of tensors, `jax.Array`s, numpy arrays, numbers,
            strings, None.
        path: a file for the endings ``.pt``, ``.pth``, ``.bin`` and ``.ckpt``; else a folder, written by orbax-checkpoint.
        step: number of the checkpoint: it is written as ``PATH/STEP`` (a folder), or ``NAME-STEP.pt``.

    Raises:
        CheckpointError: a value cannot be saved.
    """
    target = _at_step(pathlib.Path(path), step)
    tensors: list[torch.Tensor] = []
    tree = _describe(state, tensors, "state")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix in _FILES:
        content = {"format": _FORMAT, "version": _VERSION, "tree": tree, "tensors": tensors}
        _write_atomically(target, lambda file: torch.save(content, file))
    else:
        _save_folder(target, tree, tensors)


def load_checkpoint(path: Path, target: Any = None, step: int | None = None) -> Any:
    """Read what `save_checkpoint` wrote.

    Tensors that were on device ``jax`` come back there, arrays as `jax.Array`s. Named tuples come back as such where
    their class is loaded in this process, or where `target` has them.

    Args:
        path: as for `save_checkpoint`; for a folder of steps the latest is read.
        target: a nest of the same structure: gives the containers, and shapes and dtypes to check.
        step: which step to read.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint, or it does not fit `target`.
    """
    source = _find(pathlib.Path(path), step)
    content = _load_folder(source) if source.is_dir() else _load_file(source)
    try:
        state = _rebuild(content["tree"], content["tensors"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {source} is damaged: {type(error).__name__}: {error}") from error
    return state if target is None else _fit(state, target, str(source))


# ---------------------------------------------------------------------- files
def _write_atomically(target: pathlib.Path, write: Callable[[Any], None]) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    _sync_folder(target.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _load_file(source: pathlib.Path) -> dict[str, Any]:
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {source} cannot be read: it is damaged or not a checkpoint ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:  # a plain torch.save of tensors
        return {"tree": _describe(content, tensors := [], "state"), "tensors": tensors}
    if content.get("version", 0) > _VERSION:
        raise CheckpointError(
            f"the checkpoint {source} was written by a later torchax (format {content['version']}, this one reads {_VERSION})"
        )
    return content


def _save_folder(target: pathlib.Path, tree: Any, tensors: list[torch.Tensor]) -> None:
    import orbax.checkpoint as ocp

    arrays = {str(i): np.asarray(convert.t2j(t)) for i, t in enumerate(tensors)}
    description = {"format": _FORMAT, "version": _VERSION, "tree": tree}
    items = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays or {"none": np.zeros(1)}), tree=ocp.args.JsonSave(description)
    )
    with jax.enable_x64(True), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(target.absolute(), args=items, force=True)


def _load_folder(source: pathlib.Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    try:
        with jax.enable_x64(True), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            items = ocp.args.Composite(arrays=ocp.args.StandardRestore(), tree=ocp.args.JsonRestore())
            found = checkpointer.restore(source.absolute(), args=items)
        tensors = [
            convert.to_torch(np.asarray(found.arrays[str(i)]))
            for i in range(len(found.arrays))
            if str(i) in found.arrays
        ]
        return {"tree": found.tree["tree"], "tensors": tensors}
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {source} cannot be read: it is damaged or not a checkpoint ({type(error).__name__}: {error})"
        ) from error


def _at_step(path: pathlib.Path, step: int | None) -> pathlib.Path:
    if step is None:
        return path
    return path.with_name(f"{path.stem}-{step}{path.suffix}") if path.suffix in _FILES else path / str(step)


def _find(path: pathlib.Path, step: int | None) -> pathlib.Path:
    found = _at_step(path, step)
    if found.is_dir() and step is None:
        steps = [int(p.name) for p in found.iterdir() if re.fullmatch(r"\d+", p.name) and p.is_dir()]
        if steps:
            return found / str(max(steps))
    if not found.exists() and step is None and path.suffix in _FILES and path.parent.is_dir():
        pattern = re.compile(re.escape(path.stem) + r"-(\d+)" + re.escape(path.suffix))
        steps = [int(m[1]) for p in path.parent.iterdir() if (m := pattern.fullmatch(p.name))]
        if steps:
            return _at_step(path, max(steps))
    if not found.exists():
        raise CheckpointError(f"there is no checkpoint at {found}")
    return found


# ---------------------------------------------------------------------- nests as plain values
def _describe(x: Any, tensors: list[torch.Tensor], where: str) -> Any:
    """A description of `x` out of dicts, lists, strings and numbers; its tensors are appended to `tensors`."""
    if isinstance(x, torch.Tensor):
        tensors.append(x.detach().cpu())
        kind = "parameter" if isinstance(x, torch.nn.Parameter) else "tensor"
        return {"kind": kind, "at": len(tensors) - 1, "device": str(x.device), "requires_grad": x.requires_grad}
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return _describe_array(x, tensors, where)
    if x is None or type(x) in (bool, int, float, str):
        return {"kind": "value", "value": x}
    if isinstance(x, complex):
        return {"kind": "complex", "value": [x.real, x.imag]}
    if isinstance(x, (torch.dtype, torch.device)):
        return {"kind": type(x).__name__, "value": str(x)}
    if isinstance(x, Mapping):
        items = [[_describe(k, tensors, where), _describe(v, tensors, f"{where}[{k!r}]")] for k, v in x.items()]
        return {"kind": "dict", "items": items}
    fields = getattr(x, "_fields", None)
    if isinstance(x, tuple) and fields is not None:
        kind = type(x)
        items = [_describe(v, tensors, f"{where}.{name}") for name, v in zip(fields, x, strict=True)]
        return {
            "kind": "namedtuple",
            "type": f"{kind.__module__}:{kind.__qualname__}",
            "fields": list(fields),
            "items": items,
        }
    if isinstance(x, (list, tuple)):
        return {
            "kind": "list" if isinstance(x, list) else "tuple",
            "items": [_describe(v, tensors, f"{where}[{i}]") for i, v in enumerate(x)],
        }
    raise CheckpointError(
        f"{where} is a {type(x).__module__}.{type(x).__qualname__}, which a checkpoint cannot hold; save nests of tensors, arrays, "
        "numbers and strings (for a module its state_dict())"
    )


def _describe_array(x: Any, tensors: list[torch.Tensor], where: str) -> Any:
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        tensors.append(convert.to_torch(np.asarray(jax.random.key_data(x))))
        return {"kind": "key", "at": len(tensors) - 1, "impl": str(jax.random.key_impl(x))}
    host = np.asarray(x)
    try:
        tensors.append(convert.to_torch(host))
    except TypeError as error:
        raise CheckpointError(f"{where} has dtype {host.dtype}, which a checkpoint cannot hold") from error
    kind = "array" if isinstance(x, jax.Array) else "numpy"
    return {"kind": kind, "at": len(tensors) - 1}


def _rebuild(d: Any, tensors: list[torch.Tensor]) -> Any:
    kind = d["kind"]
    if kind in ("tensor", "parameter"):
        t = tensors[d["at"]]
        device = torch.device(d["device"])
        if device.type == "jax":
            t = t.to("jax" if (device.index or 0) >= len(jax.devices()) else device)
        if kind == "parameter":
            return torch.nn.Parameter(t, d["requires_grad"])
        return t.requires_grad_(d["requires_grad"])
    if kind == "array":
        return convert.to_array(tensors[d["at"]], 0)
    if kind == "numpy":
        return np.asarray(convert.to_array(tensors[d["at"]], 0))
    if kind == "key":
        return jax.random.wrap_key_data(convert.to_array(tensors[d["at"]], 0), impl=d["impl"])
    if kind == "value":
        return d["value"]
    if kind == "complex":
        return complex(*d["value"])
    if kind == "dtype":
        return getattr(torch, d["value"].removeprefix("torch."))
    if kind == "device":
        return torch.device(d["value"])
    if kind == "dict":
        return {_rebuild(k, tensors): _rebuild(v, tensors) for k, v in d["items"]}
    items = [_rebuild(x, tensors) for x in d["items"]]
    if kind == "namedtuple":
        return _named(d["type"], tuple(d["fields"]), items)
    return items if kind == "list" else tuple(items)


def _named(name: str, fields: tuple[str, ...], items: list[Any]) -> Any:
    """A named tuple of a class that is loaded already, else of one made for it. Nothing is imported, nothing is called."""
    import collections

    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, tuple) and getattr(found, "_fields", None) == fields):
        found = collections.namedtuple(qualname.rsplit(".", 1)[-1] or "Record", fields, rename=True)  # type: ignore[misc]
    return tuple.__new__(found, items)


def _fit(state: Any, target: Any, source: str, place: str = "state") -> Any:
    """`state` in the containers of `target`: mappings by key, sequences by position."""
    if isinstance(target, Mapping):
        if not isinstance(state, Mapping) or state.keys() != target.keys():
            held = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(
                f"the checkpoint {source} holds {held} at {place}, where the target has {sorted(map(str, target))}"
            )
        items = {k: _fit(state[k], v, source, f"{place}[{k!r}]") for k, v in target.items()}
        return items if type(target) is dict else unflatten(flatten(target, []), iter(_leaves(items)))
    if isinstance(target, list | tuple):
        if not isinstance(state, list | tuple) or len(state) != len(target):
            held = f"{len(state)} values" if isinstance(state, list | tuple) else type(state).__name__
            raise CheckpointError(
                f"the checkpoint {source} holds {held} at {place}, where the target has {len(target)} values"
            )
        fitted = [_fit(h, w, source, f"{place}[{k}]") for k, (h, w) in enumerate(zip(state, target, strict=True))]
        return type(target)(*fitted) if hasattr(target, "_fields") else type(target)(fitted)
    wanted: list[Any] = []
    spec = flatten(target, wanted)
    held = _leaves(state)
    if len(wanted) != len(held):
        raise CheckpointError(
            f"the checkpoint {source} holds {len(held)} values at {place}, where the target has {len(wanted)}"
        )
    return unflatten(spec, iter([_fit_leaf(h, w, source, place) for h, w in zip(held, wanted, strict=True)]))


def _fit_leaf(held: Any, wanted: Any, source: str, place: str) -> Any:
    if hasattr(wanted, "shape") and tuple(getattr(held, "shape", ())) != tuple(wanted.shape):
        raise CheckpointError(
            f"the checkpoint {source} holds a value of shape {tuple(getattr(held, 'shape', ()))} at {place}, "
            f"where the target has {tuple(wanted.shape)}"
        )
    if isinstance(wanted, Tensor) and isinstance(held, torch.Tensor) and held.device != wanted.device:
        return held.to(wanted.device)
    return held


def _leaves(x: Any) -> list[Any]:
    leaves: list[Any] = []
    flatten(x, leaves)
    return leaves


__all__ = ["load_checkpoint", "save_checkpoint"]
