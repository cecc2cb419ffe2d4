"""How tensors are read from a checkpoint, one after the other, each straight to where it shall be."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import torch
from torchax import convert, dtypes
from torchax.errors import CheckpointError
from torchax.tensor import Tensor

from ._nest import Leaf, listed

Place = Any  # a Sharding, the number of a JAX device, or None for CPU
Shardings = Any  # a Sharding for all, a mapping from names, or a function (name, shape) -> Sharding or None


class Reader(abc.ABC):
    """An open checkpoint: its nest with a `Leaf` for every tensor, and their values on demand."""

    state: Any

    def __init__(self, source: Any):
        self.source = str(source)

    @abc.abstractmethod
    def read(self, leaf: Leaf, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The values of a tensor (or of a part of it) on CPU, possibly memory of the file's."""

    def put(self, leaf: Leaf, place: Place) -> Any:
        """A tensor at its place: a `jax.Array`, or for place None a CPU tensor of its own memory."""
        if place is None or isinstance(place, int):
            values = _cast(self.read(leaf), leaf)
            check(leaf, values)
            return values.clone() if place is None else convert.to_array(values, place)
        parts: dict[str, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            key = str(index)  # several devices may hold the same part
            if key not in parts:
                parts.clear()
                parts[key] = convert.host_values(_cast(self.read(leaf, index), leaf))
            return parts[key]

        with jax.enable_x64(True):
            return jax.make_array_from_callback(leaf.shape, place, part, dtype=dtypes.to_jax(leaf.cast or leaf.dtype))

    def put_all(self, places: list[tuple[Leaf, Place]]) -> list[Any]:
        """All of them.

        Raises:
            CheckpointError: some cannot be read; names them.
        """
        found, failed = [], []
        for leaf, place in places:
            try:
                found.append(self.put(leaf, place))
            except Exception as error:
                failed.append((leaf.name, error))
        if failed:
            raise unreadable(self.source, [name for name, _ in failed], len(places), failed[0][1])
        return found

    def close(self) -> None:  # noqa: B027 (most have nothing open)
        """Give files back."""


def unreadable(source: str, names: list[str], total: int | None, cause: BaseException | str) -> CheckpointError:
    """The exception for tensors that cannot be read."""
    reason = (
        cause
        if isinstance(cause, str)
        else f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}"
    )
    of = f" of {total}" if total is not None else ""
    error = CheckpointError(
        f"the checkpoint {source} cannot be read: {len(names)}{of} tensors are damaged or cut off: {listed(names)} ({reason})"
    )
    error.__cause__ = cause if isinstance(cause, BaseException) else None
    return error


def _cast(values: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    return values if leaf.cast is None else values.to(leaf.cast)


def check(leaf: Leaf, values: Any) -> None:
    """Raises ValueError where what was read is not what the checkpoint's description says."""
    if tuple(values.shape) != leaf.shape:
        raise ValueError(f"{leaf.name} is described with shape {leaf.shape}, and has shape {tuple(values.shape)}")


# ---------------------------------------------------------------------- where tensors go
def place_of(leaf: Leaf, shardings: Shardings, device: torch.device | None) -> Place:
    """Where a tensor shall be: what was asked for, else where the target has it, else where it was saved from."""
    sharding = _sharding_for(leaf, shardings)
    if sharding is not None:
        return sharding
    want = leaf.wanted
    if device is not None:
        return (device.index or 0) if device.type == "jax" else None
    if isinstance(want, Tensor):
        return _place_of_array(want.jax(), want.device.index or 0)
    if isinstance(want, (jax.Array, jax.ShapeDtypeStruct)):
        return _place_of_array(want, 0)
    if isinstance(want, np.ndarray) or (isinstance(want, torch.Tensor) and want.device.type == "cpu"):
        return None
    if leaf.entry["kind"] in ("tensor", "parameter"):
        saved = torch.device(leaf.entry["device"])
        if saved.type != "jax":
            return None
        return saved.index if (saved.index or 0) < len(jax.devices()) else 0
    return None if leaf.entry["kind"] == "numpy" else 0


def _place_of_array(x: Any, index: int) -> Place:
    sharding = getattr(x, "sharding", None)
    return sharding if sharding is not None and len(sharding.device_set) > 1 else index


def _sharding_for(leaf: Leaf, shardings: Shardings) -> Any:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return shardings
    if isinstance(shardings, Mapping):
        return shardings.get(leaf.name)
    return shardings(leaf.name, leaf.shape)


def check_shardings(places: list[tuple[Leaf, Place]]) -> None:
    """Every sharding divides its tensor.

    Raises:
        CheckpointError: names those for which that is not so.
    """
    problems = []
    for leaf, place in places:
        if isinstance(place, jax.sharding.Sharding):
            try:
                place.shard_shape(leaf.shape)
            except (ValueError, IndexError):
                problems.append(f"{leaf.name} of shape {leaf.shape} by {place}")
    if problems:
        raise CheckpointError(
            "shardings that do not divide their tensors: "
            f"{listed(problems, '; ')}. Give sharding= as a mapping or a function that leaves these out"
        )


def finish(leaf: Leaf, value: Any) -> Any:
    """What was read as the kind of value that the target, or else the description, says."""
    want, kind = leaf.wanted, leaf.entry["kind"]
    if kind == "key":
        return jax.random.wrap_key_data(value, impl=leaf.entry["impl"])
    if isinstance(want, torch.Tensor):
        kind = "parameter" if isinstance(want, torch.nn.Parameter) else "tensor"
    elif want is not None:
        kind = "numpy" if isinstance(want, np.ndarray) else "array"
    if kind == "numpy":
        return np.asarray(value) if isinstance(value, jax.Array) else convert.host_values(value)
    if kind == "array":
        return value if isinstance(value, jax.Array) else convert.to_array(value, 0)
    requires_grad = bool(getattr(want, "requires_grad", leaf.entry.get("requires_grad", True)))
    tensor = Tensor(value) if isinstance(value, jax.Array) else value
    return torch.nn.Parameter(tensor, requires_grad) if kind == "parameter" else tensor.requires_grad_(requires_grad)


@contextlib.contextmanager
def reading(source: Any) -> Iterator[None]:
    """Whatever goes wrong inside becomes a `CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise CheckpointError(
            f"the checkpoint {source} cannot be read: it is damaged or not a checkpoint ({type(error).__name__}: {text[0] if text else ''})"
        ) from error
