"""The words of `torch.distributed.tensor` on tensors of device jax: placements on a device mesh are `NamedSharding`s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch.distributed.device_mesh import DeviceMesh as TorchMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torchax.tensor import Tensor

from ._mesh import as_mesh, axes_of, checked_sharding
from .sharding import _to_sharding, constrain


def DeviceMesh(device_type: str, mesh: Any, *, mesh_dim_names: Sequence[str] | None = None) -> TorchMesh:
    """torch's `DeviceMesh` over JAX's devices; no process group is made, since XLA does the communication.

    Args:
        device_type: ``"jax"``.
        mesh: ids of JAX devices in the shape of the mesh, a nest of lists or a tensor.
        mesh_dim_names: names of its dimensions.
    """
    if device_type != "jax":
        raise ValueError(f"a mesh for tensors on device jax has device_type 'jax'; got {device_type!r}")
    ids = torch.as_tensor(mesh, dtype=torch.int, device="cpu")
    names = None if mesh_dim_names is None else tuple(mesh_dim_names)
    made = TorchMesh("cpu", ids, mesh_dim_names=names, _init_backend=False, _rank=int(ids.flatten()[0]))
    made._device_type = "jax"
    as_mesh(made)
    return made


def init_device_mesh(
    device_type: str, mesh_shape: Sequence[int], *, mesh_dim_names: Sequence[str] | None = None
) -> TorchMesh:
    """`DeviceMesh` of a shape, over the first JAX devices."""
    shape = tuple(mesh_shape)
    n = int(torch.Size(shape).numel())
    devices = jax.devices()
    if n > len(devices):
        raise ValueError(f"a mesh of shape {shape} needs {n} devices; there are {len(devices)}")
    ids = torch.tensor([d.id for d in devices[:n]]).view(shape)
    return DeviceMesh(device_type, ids, mesh_dim_names=mesh_dim_names)


def sharding_of(mesh: Any, placements: Sequence[Any] | None, shape: Sequence[int]) -> NamedSharding:
    """The `NamedSharding` that placements on a mesh mean for a tensor of `shape`; one placement per mesh dimension.

    Raises:
        ValueError: another number of placements, a dimension that there is not or that is not divided evenly, or `Partial`.
    """
    mesh, shape = as_mesh(mesh), tuple(shape)
    placements = [Replicate()] * len(mesh.axis_names) if placements is None else list(placements)
    if len(placements) != len(mesh.axis_names):
        raise ValueError(
            f"one placement for each dimension of the mesh is expected, {len(mesh.axis_names)} for {dict(mesh.shape)}; got {placements}"
        )
    axes: list[tuple[str, ...]] = [()] * len(shape)
    for axis, placement in zip(mesh.axis_names, placements, strict=True):
        if isinstance(placement, Shard):
            if not -len(shape) <= placement.dim < len(shape):
                raise ValueError(f"{placement} is about a dimension that a tensor of shape {list(shape)} does not have")
            axes[placement.dim] = (*axes[placement.dim], axis)
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"tensors on device jax are placed with Shard and Replicate; got {placement!r} for mesh dimension {axis!r}"
            )
    spec = [None if not a else a[0] if len(a) == 1 else a for a in axes]
    return checked_sharding(mesh, spec, shape, "the tensor")


def placements_of(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor is placed, one placement per dimension of its mesh.

    Raises:
        AttributeError: it lies on one device.
    """
    sharding = _named(tensor)
    result: list[Any] = [Replicate()] * len(sharding.mesh.axis_names)
    for dim, entry in enumerate(sharding.spec):
        for axis in axes_of(entry):
            result[sharding.mesh.axis_names.index(axis)] = Shard(dim)
    return tuple(result)


def device_mesh_of(tensor: Tensor) -> TorchMesh:
    """The mesh that a tensor lies on, as torch's `DeviceMesh`.

    Raises:
        AttributeError: it lies on one device.
    """
    mesh = _named(tensor).mesh
    assert isinstance(mesh, Mesh)
    ids = torch.tensor([d.id for d in mesh.devices.flat]).view(mesh.devices.shape)
    return DeviceMesh("jax", ids, mesh_dim_names=mesh.axis_names)


def _named(tensor: Tensor) -> NamedSharding:
    sharding = tensor._s.sharding if tensor._v is None else None
    if sharding is None:
        sharding = getattr(tensor.jax(), "sharding", None)
    if not isinstance(sharding, NamedSharding):
        raise AttributeError(
            "the tensor lies on one device: it has no placements; see torchax.interop.distribute_tensor"
        )
    return sharding


def distribute_tensor(tensor: torch.Tensor, device_mesh: Any, placements: Sequence[Any] | None = None) -> torch.Tensor:
    """A leaf tensor laid out over a mesh, as `torch.distributed.tensor.distribute_tensor` does it.

    Args:
        tensor: on CPU (each part goes to its device only) or on device jax.
        device_mesh: torch's `DeviceMesh`, or a `jax.sharding.Mesh`.
        placements: a `Shard` or `Replicate` for each dimension of the mesh; all `Replicate` if None.

    Raises:
        ValueError: placements, mesh and shape do not fit.
    """
    sharding = sharding_of(device_mesh, placements, tensor.shape)
    if type(tensor) is Tensor:
        result = constrain(tensor.detach(), sharding)
        result._s.sharding = sharding  # type: ignore[attr-defined]
    else:
        result = _to_sharding(tensor.detach(), sharding)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(result, tensor.requires_grad)
    return result.requires_grad_(tensor.requires_grad)


def distribute_module(
    module: torch.nn.Module, device_mesh: Any, partition_fn: Callable[[str, torch.nn.Module, Any], None] | None = None
) -> torch.nn.Module:
    """Lay the parameters and buffers of a module out, as `torch.distributed.tensor.distribute_module` does it.

    Args:
        module: on CPU or on device jax; changed in place.
        device_mesh: torch's `DeviceMesh`, or a `jax.sharding.Mesh`.
        partition_fn: called with the name, the module and the mesh for every submodule; registers parameters that
            `distribute_tensor` has placed. What it leaves alone is replicated.
    """
    for name, child in module.named_modules():
        if partition_fn is not None:
            partition_fn(name, child, device_mesh)
        for table in (child._parameters, child._buffers):
            for key, t in table.items():
                if t is not None and not (type(t) is Tensor and t._s.sharding is not None):
                    table[key] = distribute_tensor(t, device_mesh)  # type: ignore[assignment]
    return module


def redistribute(
    tensor: torch.Tensor, device_mesh: Any = None, placements: Sequence[Any] | None = None
) -> torch.Tensor:
    """The same values with other placements; gradients go back to the old ones. See `distribute_tensor`."""
    if type(tensor) is not Tensor:
        raise TypeError(f"redistribute takes a tensor on device jax; got one on {tensor.device}")
    mesh = _named(tensor).mesh if device_mesh is None else device_mesh
    return constrain(tensor, sharding_of(mesh, placements, tensor.shape))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every device of its mesh; itself where it lies on one device. All processes call it together."""
    if type(tensor) is not Tensor:
        return tensor
    try:
        mesh = _named(tensor).mesh
    except AttributeError:
        return tensor
    assert isinstance(mesh, Mesh)
    return constrain(tensor, NamedSharding(mesh, PartitionSpec()))


__all__ = [
    "DeviceMesh", "Partial", "Replicate", "Shard", "device_mesh_of", "distribute_module", "distribute_tensor", "full_tensor",
    "init_device_mesh", "placements_of", "redistribute", "sharding_of",
]  # fmt: skip
