"""Meshes: how devices are arranged, and checks that a layout fits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.interpreters.pxla
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """Devices arranged along named axes, ``make_mesh(data=2, model=4)``.

    Args:
        devices: JAX devices; those of all processes if None, the first ones where fewer are needed.
        axes: size of each axis, the slowest first; one may be -1, which takes what is left.

    Raises:
        ValueError: the sizes do not fit the number of devices.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = dict(axes)
    if not sizes or any(not isinstance(n, int) or (n < 1 and n != -1) for n in sizes.values()):
        raise ValueError(f"make_mesh takes axes with sizes, make_mesh(data=2, model=4); got {axes}")
    open_axes = [name for name, n in sizes.items() if n == -1]
    known = math.prod(n for n in sizes.values() if n != -1)
    if len(open_axes) > 1:
        raise ValueError(f"one axis of a mesh may have size -1; got {open_axes}")
    if open_axes:
        sizes[open_axes[0]] = len(found) // known
        if not sizes[open_axes[0]] or len(found) % known:
            raise ValueError(f"{len(found)} devices cannot be divided into groups of {known} ({axes})")
    needed = math.prod(sizes.values())
    if needed > len(found):
        raise ValueError(f"a mesh of {sizes} needs {needed} devices; there are {len(found)}")
    return Mesh(np.array(found[:needed]).reshape(tuple(sizes.values())), tuple(sizes))


def as_mesh(mesh: Any) -> Mesh:
    """The `jax.sharding.Mesh`, for XLA to place what is not said, of a mesh of JAX's, of torch's or of `torchax.mesh_util`."""
    mesh = getattr(mesh, "jax_mesh", mesh)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names)  # JAX's make_mesh gives axes whose layout is part of the types
    ids, names = getattr(mesh, "mesh", None), getattr(mesh, "mesh_dim_names", None)
    if ids is None:
        raise TypeError(
            f"expected a jax.sharding.Mesh, as torchax.interop.make_mesh(data=8) gives it; got {type(mesh).__name__}"
        )
    names = names or tuple(f"dim_{i}" for i in range(ids.dim()))
    by_id = {d.id: d for d in jax.devices()}
    numbers = [int(n) for n in ids.flatten()]
    if missing := sorted(set(numbers) - set(by_id)):
        raise ValueError(f"the mesh names devices {missing}; JAX has {sorted(by_id)}")
    return Mesh(np.array([by_id[n] for n in numbers]).reshape(tuple(ids.shape)), tuple(names))


def constrained_around(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The array, divided as `spec` says over the mesh of the ``with jax.set_mesh(mesh)``, or ``with mesh``, around the call.

    Raises:
        RuntimeError: there is no mesh.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return jax.lax.with_sharding_constraint(array, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as `with mesh` itself is
        mesh = jax.interpreters.pxla.thread_resources.env.physical_mesh
    if mesh.empty:
        raise RuntimeError(f"{spec} names a mesh axis, and there is no mesh: call it within `with jax.set_mesh(mesh):`")
    sharding = checked_sharding(as_mesh(mesh), spec, array.shape, "an argument or result")
    return jax.lax.with_sharding_constraint(array, sharding)


def as_spec(spec: Any) -> PartitionSpec:
    """A `PartitionSpec` of what users write: one, an axis name, a tuple of names and None, None for a replicated tensor."""
    if isinstance(spec, PartitionSpec):
        return spec
    if spec is None:
        return PartitionSpec()
    return PartitionSpec(spec) if isinstance(spec, str) else PartitionSpec(*spec)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def size_of(mesh: Mesh, axes: tuple[str, ...]) -> int:
    """Over how many devices the axes divide a dimension."""
    return math.prod(mesh.shape[a] for a in axes)


def checked_sharding(mesh: Mesh, spec: Any, shape: Sequence[int], what: str) -> NamedSharding:
    """The sharding, if it fits a tensor of `shape`.

    Raises:
        ValueError: an axis is not in the mesh or is used twice, a dimension is missing or cannot be divided; names `what`.
    """
    spec, shape = as_spec(spec), tuple(shape)
    used: list[str] = [a for entry in spec for a in axes_of(entry)]
    if unknown := [a for a in used if a not in mesh.shape]:
        raise ValueError(f"{what}: {spec} names mesh axes {unknown}; the mesh has {dict(mesh.shape)}")
    if len(set(used)) != len(used):
        raise ValueError(f"{what}: {spec} uses a mesh axis twice; each divides one dimension")
    if len(spec) > len(shape):
        raise ValueError(f"{what} has shape {list(shape)}; {spec} is about {len(spec)} dimensions")
    for i, entry in enumerate(spec):
        n = size_of(mesh, axes_of(entry))
        if shape[i] % n:
            raise ValueError(
                f"{what} has shape {list(shape)}: dimension {i} of size {shape[i]} cannot be divided evenly over {n} devices "
                f"(mesh axis {entry!r} of {dict(mesh.shape)}); leave it whole with None, pad it, or use another mesh"
            )
    return NamedSharding(mesh, spec)


__all__ = ["make_mesh"]
