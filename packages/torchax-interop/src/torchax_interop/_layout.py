"""Programs over several devices: where their state lies before and after a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.core
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax import random as _random
from torchax._sharding import place
from torchax._storage import Storage

if TYPE_CHECKING:
    from ._program import Program
    from ._recorder import Recorder


def output_layout(program: Program, recorder: Recorder) -> list[Any]:
    """Where the program's outputs are pinned to lie, None for those that XLA places.

    State that is written but lies on one device only is replicated over the mesh, so that it lies at the next call as it
    does at the first.
    """
    given = [g.value(recorder.leaves) for g in program.groups if g.kind != "cpu"]
    program.sources = [s for s in program.storages if is_source(s)]
    state = [s.value for s in program.storages if not is_source(s)]  # random states come to where the rest is
    program.mesh = mesh_of([*state, *program.constants, *given])
    if program.mesh is not None:
        for storage in program.written:
            if storage.sharding is None and not _spread(storage.value):
                storage.value = place(storage.value, NamedSharding(program.mesh, PartitionSpec()))
    outs: list[Any] = [None] * program.counts[0]
    outs += [s.sharding for s in (*program.written, *program.survivors)]
    for k in program.changed:
        leaf = recorder.leaves[program.groups[k].members[0]]
        whole = program.groups[k].kind == "storage" or (program.groups[k].kind == "tensor" and leaf._v is None)
        outs.append(leaf._s.sharding if whole else None)
    return outs


def laid_out(layout: list[Any], n: int) -> dict[str, Any]:
    """The layout as an option of `jax.jit`, for a function of `n` results that begin with the program's outputs."""
    if all(s is None for s in layout):
        return {}
    return {"out_shardings": [*layout, *[None] * (n - len(layout))]}


def mesh_of(values: list[Any]) -> Mesh | None:
    """The mesh that the first array on several devices lies on."""
    for value in values:
        if _spread(value):
            sharding = value.sharding
            named = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
            return sharding.mesh if named else _line(sharding)  # pyright: ignore[reportReturnType]
    return None


def _line(sharding: Any) -> Mesh:
    return Mesh(np.array(sorted(sharding.device_set, key=lambda d: d.id)), ("devices",))


def _spread(value: Any) -> bool:
    return (
        isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and len(value.sharding.device_set) > 1
    )


def is_source(storage: Storage) -> bool:
    """Whether it is a state of random numbers."""
    return storage.geometry is _random._META


def settle_source(source: Storage, mesh: Mesh | None) -> None:
    """Bring a state of random numbers to the devices of the program that is about to use it."""
    value = source.value
    if mesh is None:
        if _spread(value):
            source.value = np.asarray(value)
    elif not _spread(value) or value.sharding.device_set != set(mesh.devices.flat):
        source.value = place(np.asarray(value), NamedSharding(mesh, PartitionSpec()))
