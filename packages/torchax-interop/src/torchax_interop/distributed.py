"""Several processes: starting them, batches of which each process loads its part, and what only one of them does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import torch
from jax.experimental import multihost_utils
from torch.utils.data import DistributedSampler
from torchax import convert
from torchax._storage import dense_meta
from torchax.tensor import Tensor, wrap

from ._mesh import as_mesh, checked_sharding
from ._tree import tree_map


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    **options: Any,
) -> None:
    """Join the processes of a program. To be called first thing, before anything computes on device jax.

    What is not given is taken from the variables that torchrun sets (MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK), else found out
    by JAX (on TPU pods, SLURM, ...). Random numbers start from process 0's seed in all of them. On CPU, gloo does the communication.

    Args:
        coordinator_address: ``"host:port"`` of process 0.
        num_processes: how many there are.
        process_id: the number of this one.
        options: as for `jax.distributed.initialize` (``local_device_ids``, ``initialization_timeout``).

    Raises:
        RuntimeError: JAX has started already.
    """
    env = os.environ
    if coordinator_address is None and {"MASTER_ADDR", "WORLD_SIZE", "RANK"} <= env.keys():
        coordinator_address = f"{env['MASTER_ADDR']}:{env.get('MASTER_PORT', '29500')}"
        num_processes, process_id = int(env["WORLD_SIZE"]), int(env["RANK"])
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id, **options)
    except RuntimeError as error:
        raise RuntimeError(
            f"torchax.distributed.initialize() comes first, before anything computes on device jax, and once: {error}"
        ) from error
    if jax.process_count() > 1:
        seed = np.array([torch.initial_seed() >> 32, torch.initial_seed() & 0xFFFFFFFF], np.uint32)
        high, low = multihost_utils.broadcast_one_to_all(seed)
        torch.manual_seed(int(high) << 32 | int(low))


def shutdown() -> None:
    """Leave the program; the other processes are told."""
    jax.distributed.shutdown()


def process_index() -> int:
    """The number of this process (torch's rank)."""
    return jax.process_index()


def process_count() -> int:
    """How many processes there are (torch's world size)."""
    return jax.process_count()


def barrier(name: str = "torchax") -> None:
    """Wait until every process has come here."""
    multihost_utils.sync_global_devices(name)


def sampler(dataset: Any, **options: Any) -> DistributedSampler:
    """A `torch.utils.data.DistributedSampler` that gives each process its part of the data; ``set_epoch`` shuffles anew."""
    return DistributedSampler(dataset, num_replicas=process_count(), rank=process_index(), **options)


def global_batch(batch: Any, mesh: Any, axis: Any = "data", *, dim: int = 0) -> Any:
    """Global tensors of what each process has loaded.

    Args:
        batch: a nest of CPU tensors or NumPy arrays, this process's part of the batch, of the same shapes in each process.
        mesh: over the devices of all processes.
        axis: the mesh axis, or axes, that the global batch is divided over.
        dim: the dimension of the batch.

    Returns:
        The nest; dimension `dim` of each tensor is as long as all parts together.

    Raises:
        ValueError: the parts do not fit the mesh.
    """
    mesh = as_mesh(mesh)

    def join(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(x)
        if not isinstance(x, torch.Tensor):
            return x
        if type(x) is Tensor:
            x = x.cpu()
        if not x.dim():
            raise ValueError("a 0-d tensor has no batch dimension; pass numbers as such")
        spec: list[Any] = [None] * x.dim()
        spec[dim] = axis
        unchecked = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        parts = _parts(unchecked, dim % x.dim(), x.dim())
        shape = list(x.shape)
        shape[dim] *= parts
        sharding = checked_sharding(
            mesh, spec, shape, f"a tensor of the batch ({list(x.shape)} from each of {parts} parts)"
        )
        with jax.enable_x64(True):
            value = jax.make_array_from_process_local_data(sharding, convert.host_values(x), tuple(shape))
        return wrap(value, dense_meta(tuple(shape), x.dtype))

    return tree_map(join, batch)


def _parts(sharding: Any, dim: int, rank: int) -> int:
    """Into how many parts the processes divide a dimension."""
    n = 1
    for entry_axes in [sharding.spec[dim]]:
        names = (entry_axes,) if isinstance(entry_axes, str) else tuple(entry_axes or ())
        for name in names:
            n *= sharding.mesh.shape[name]
    shape = tuple(n if i == dim else 1 for i in range(rank))
    spans: dict[int, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        start, stop, _ = index[dim].indices(n)
        spans.setdefault(device.process_index, set()).update(range(start, stop))
    return n // len(spans[jax.process_index()])


def global_batches(loader: Iterable[Any], mesh: Any, axis: Any = "data") -> Iterator[Any]:
    """`global_batch` of everything that a data loader gives."""
    for batch in loader:
        yield global_batch(batch, mesh, axis)


__all__ = [
    "barrier",
    "global_batch",
    "global_batches",
    "initialize",
    "process_count",
    "process_index",
    "sampler",
    "shutdown",
]
