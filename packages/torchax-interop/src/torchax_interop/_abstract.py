"""Models without values: parameters that are shapes and layouts, for programs that are compiled but not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax._storage import Storage, dense_meta
from torchax.tensor import Tensor, make

from .rules import Rules
from .sharding import laid_out_modules, plan


def abstract_tensor(like: torch.Tensor, sharding: NamedSharding) -> Tensor:
    """A tensor of device jax with the shape and dtype of `like`, row-major, whose payload is a `jax.ShapeDtypeStruct`."""
    meta = dense_meta(tuple(like.shape), like.dtype)
    storage = Storage(jax.ShapeDtypeStruct(meta.shape, meta.jax_dtype, sharding=sharding), meta)
    storage.sharding = sharding
    made = make(storage, meta)
    return made.requires_grad_(like.requires_grad)  # type: ignore[return-value]


class Abstracted:
    """Modules and optimizers whose tensors are abstract for a while.

    Attributes:
        storages: of the abstract tensors.
        batch: mesh axes that divide the batch.
    """

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.batch: tuple[str, ...] = ()

    @property
    def bytes_per_device(self) -> int:
        """What one device holds of parameters, buffers, gradients that stay and the optimizers' state."""
        return sum(bytes_on_a_device(s.value) for s in self.storages)


@contextlib.contextmanager
def abstracted(
    modules: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer], mesh: Mesh, rules: Rules
) -> Iterator[Abstracted]:
    """Within, the tensors of the modules and the state of the optimizers are abstract, and laid out as the rules say.

    The tensors remain the same objects, for optimizers and whoever else holds them; afterwards they are what they were.

    Raises:
        ValueError: rules and model, or rules and mesh, do not fit.
    """
    found, layout = Abstracted(), {}
    chosen: list[tuple[torch.Tensor, NamedSharding]] = []
    for module in modules:
        entries, batch = plan(module, mesh, rules)
        found.batch += tuple(a for a in batch if a not in found.batch)
        chosen += [(e.tensor, sharding) for e, sharding in entries if id(e.tensor) not in layout]
        layout.update((id(e.tensor), sharding) for e, sharding in entries)
    whole = NamedSharding(mesh, PartitionSpec())
    for optimizer in optimizers:
        for p, values in optimizer.state.items():
            for value in values.values():
                if isinstance(value, torch.Tensor):
                    chosen.append((value, layout.get(id(p), whole) if value.shape == p.shape else whole))
    before = [(o, {p: dict(values) for p, values in o.state.items()}) for o in optimizers]
    grads = [(t, t.grad) for t, _ in chosen]
    swapped: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for t, sharding in chosen:
            t.grad = None
            made: Any = abstract_tensor(t, sharding)
            if isinstance(t, torch.nn.Parameter):
                made = torch.nn.Parameter(made, t.requires_grad)
            found.storages.append(made._s)
            _swap(t, made)
            swapped.append((t, made))
        with laid_out_modules(modules, mesh, found.batch):
            yield found
    finally:
        for optimizer, state in before:
            for p in list(optimizer.state):
                if p in state:
                    optimizer.state[p] = state[p]
                else:
                    del optimizer.state[p]
        for t, made in swapped:
            t.grad = None
            _swap(t, made)
        for t, grad in grads:
            t.grad = grad


def _swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """Two Python objects exchange what they are.

    `torch.utils.swap_tensors` refuses tensors that an autograd graph holds, since the graph goes on with what it has. That is
    what is wanted here: a graph of the recording that the user keeps, or an error's traceback, must not keep the model abstract.
    """
    for name in ("__class__", "__dict__"):
        ours, theirs = getattr(a, name), getattr(b, name)
        setattr(a, name, theirs)
        setattr(b, name, ours)
    torch._C._swap_tensor_impl(a, b)  # type: ignore[attr-defined]


def bytes_on_a_device(x: jax.ShapeDtypeStruct) -> int:
    """What one device holds of it."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    n = x.dtype.itemsize
    for size in shape:
        n *= size
    return n
