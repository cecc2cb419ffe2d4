"""The arguments of a recorded call as inputs of its program, and how the program is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torchax import convert
from torchax._execute.strict import STRICT
from torchax._storage import Storage, TensorMeta, meta_of
from torchax.tensor import Tensor


@dataclasses.dataclass(eq=False)
class Group:
    """Arguments that share a storage: one input of the program.

    Attributes:
        kind: ``tensor`` (one tensor, by value), ``storage`` (several tensors, the whole payload), ``cpu``, ``array``.
        members: positions among the leaves.
    """

    kind: str
    members: list[int]

    def value(self, leaves: list[Any]) -> Any:
        """The array to pass: JAX moves a CPU tensor's values itself, faster than if asked before."""
        leaf = leaves[self.members[0]]
        if self.kind == "tensor":
            return leaf._s.value if leaf._v is None else STRICT.read(leaf)
        if self.kind == "array":
            return leaf
        return leaf._s.value if self.kind == "storage" else convert.host_values(leaf)

    def store(self, leaves: list[Any], value: Any) -> None:
        """Write the argument back."""
        leaf = leaves[self.members[0]]
        if self.kind == "tensor":
            STRICT.write(leaf, value)
        elif self.kind == "storage":
            STRICT.store(leaf._s, value)
        else:
            with torch.no_grad():
                leaf.copy_(convert.to_torch(np.asarray(value)))


def group_leaves(leaves: list[Any]) -> list[Group]:
    """The inputs that the leaves make."""
    groups: list[Group] = []
    by_storage: dict[Storage, Group] = {}
    for i, x in enumerate(leaves):
        if type(x) is Tensor:
            known = by_storage.get(x._s)
            if known is None:
                known = by_storage[x._s] = Group("tensor", [])
                groups.append(known)
            known.members.append(i)
            if len(known.members) > 1:
                known.kind = "storage"
        elif isinstance(x, torch.Tensor):
            groups.append(Group("cpu", [i]))
        elif isinstance(x, jax.Array):
            groups.append(Group("array", [i]))
    return groups


@dataclasses.dataclass
class Options:
    """How programs are compiled: donation and layout.

    Attributes:
        donate_state: overwrite the buffers of captured tensors that the function writes.
        donate: whether the leaf at a position may be overwritten.
        in_shardings: for each leaf its sharding, or None.
        out_shardings: a prefix of the nest of results, or None.
        jit: further options of `jax.jit`.
    """

    donate_state: bool = True
    donate: Callable[[int], bool] = lambda i: False
    in_shardings: list[Any] | None = None
    out_shardings: Any = None
    jit: dict[str, Any] = dataclasses.field(default_factory=dict)


def dense(meta: TensorMeta) -> TensorMeta:
    """The metadata of a copy: the same shape without gaps."""
    if meta.contiguous:
        return meta
    return meta_of(meta.shape, tuple(torch.empty_like(meta.on_meta()).stride()), meta.dtype, meta.index)
