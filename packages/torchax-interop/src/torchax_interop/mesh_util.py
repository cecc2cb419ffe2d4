"""Meshes with a rule for sharding in them, under the names that earlier versions of torchax gave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch
from jax.sharding import PartitionSpec

from ._mesh import as_mesh, make_mesh
from .rules import Entry, Rule
from .sharding import deferred_init, shard_module

Sharder = Callable[[str, Any], Any]


class SingleAxisSharder:
    """Divides the first dimension that the axis divides evenly.

    Args:
        axis_name: the mesh axis.
        axis_size: its size.
        replicate_unshardable: whether tensors without such a dimension are replicated; else they are refused.
    """

    def __init__(self, axis_name: str, axis_size: int, replicate_unshardable: bool = False):
        self.axis_name, self.axis_size, self.replicate_unshardable = axis_name, axis_size, replicate_unshardable

    def __call__(self, name: str, shapedtype: Any) -> PartitionSpec:
        shape = tuple(shapedtype.shape)
        for i, n in enumerate(shape):
            if n and n % self.axis_size == 0:
                return PartitionSpec(*[self.axis_name if k == i else None for k in range(len(shape))])
        if self.replicate_unshardable or not shape:
            return PartitionSpec()
        raise ValueError(
            f"no dimension of {name!r}, of shape {list(shape)}, can be divided evenly over {self.axis_size} devices "
            f"(mesh axis {self.axis_name!r}); pass replicate_unshardable=True to keep such tensors whole"
        )


class Mesh:
    """A mesh, and the sharder that is used where none is given.

    Args:
        jax_mesh: a `jax.sharding.Mesh`.
        sharder: ``sharder(name, shape_and_dtype)`` gives the `PartitionSpec` of a parameter or buffer.
    """

    def __init__(self, jax_mesh: Any, sharder: Sharder | None = None):
        self.jax_mesh = as_mesh(jax_mesh)
        if sharder is None:
            if len(self.jax_mesh.axis_names) != 1:
                raise ValueError(f"a mesh of several axes ({dict(self.jax_mesh.shape)}) needs a sharder")
            sharder = SingleAxisSharder(self.jax_mesh.axis_names[0], self.jax_mesh.size)
        self.sharder = sharder

    @classmethod
    def fsdp_mesh(cls, axis_name: str = "fsdp") -> Mesh:
        """One axis over all devices; every parameter is divided over it, or kept whole where it cannot be."""
        count = jax.device_count()
        return cls(
            make_mesh(None, **{axis_name: count}), SingleAxisSharder(axis_name, count, replicate_unshardable=True)
        )

    def initialize_model_sharded(
        self,
        model_class: Callable[..., torch.nn.Module],
        init_args: tuple[Any, ...] = (),
        init_kwargs: dict[str, Any] | None = None,
        override_sharder: Sharder | None = None,
    ) -> torch.nn.Module:
        """``model_class(*init_args, **init_kwargs)``, born divided: see `torchax.interop.deferred_init`."""
        return deferred_init(
            lambda: model_class(*init_args, **(init_kwargs or {})),
            self.jax_mesh,
            _rule(override_sharder or self.sharder),
        )

    def shard_model(self, model: torch.nn.Module, override_sharder: Sharder | None = None) -> torch.nn.Module:
        """Lay a model out in place: see `torchax.interop.shard_module`."""
        return shard_module(model, self.jax_mesh, _rule(override_sharder or self.sharder))


def _rule(sharder: Sharder) -> Rule:
    def assign(entries: list[Entry], mesh: Any) -> None:
        from torchax import dtypes

        for entry in entries:
            t = entry.tensor
            found = sharder(entry.names[0], jax.ShapeDtypeStruct(tuple(t.shape), dtypes.to_jax(t.dtype)))
            entry.spec = getattr(found, "spec", found)

    return Rule(assign)


__all__ = ["Mesh", "SingleAxisSharder"]
