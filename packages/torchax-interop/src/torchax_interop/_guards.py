"""What a program took for granted about the world around it, in a form that is checked in a few microseconds."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torchax._storage import Storage
from torchax.tensor import Tensor

from ._recording import Recording

_storage_of = operator.attrgetter("_s")
_requires_grad_of = operator.attrgetter("requires_grad")
_grad_of = operator.attrgetter("grad")


class Guards:
    """See the module.

    Args:
        recording: the call that was recorded, still open.
        grads: parameter (by id) -> (parameter, gradient before the call), of those whose gradients matter.
    """

    def __init__(self, recording: Recording, grads: dict[int, tuple[Tensor, Any]]):
        self.modules = [(m.__dict__, flag) for m, flag, _ in recording.modules.values()]
        slots = []
        for m, _, _ in recording.modules.values():
            for table in (m._parameters, m._buffers):
                slots += [(table, name, t) for name, t in table.items() if t is not None]
        self.slots = slots
        self.tensors = list(recording.tensors.values())
        self.storages = [t._s for t in self.tensors]
        self.requires_grad = [t.requires_grad for t in self.tensors]
        self.settings = recording.settings
        self.optimizers = list(recording.optimizers.values())
        self.without_grad = [t for t, g in grads.values() if g is None]
        self.with_grad = [t for t, g in grads.values() if g is not None]
        captured = recording.captured
        self.exact_grads = [(t, g) for t, g in grads.values() if type(g) is Tensor and g._s in captured]
        self.captured: frozenset[Storage] = frozenset(captured)
        self.replaced: dict[int, Storage] = {}

    def failure(self, leaves: list[Any], tensor_leaves: list[int]) -> str | None:
        """Why the program does not fit, in words; None where it does."""
        if not all(map(operator.is_, map(_storage_of, self.tensors), self.storages)):
            return "a parameter got another storage"
        if list(map(_requires_grad_of, self.tensors)) != self.requires_grad:
            return "requires_grad of a parameter was changed"
        if not all(map(operator.is_, map(_grad_of, self.without_grad), itertools.repeat(None))):
            return "a parameter has a gradient now"
        if self.with_grad and any(map(operator.is_, map(_grad_of, self.with_grad), itertools.repeat(None))):
            return "a parameter has no gradient now"
        for t, g in self.exact_grads:
            if t.grad is not g:
                return "the gradient of a parameter was replaced"
        for table, flag in self.modules:
            if table["training"] is not flag:
                return "a module was switched between training and evaluation"
        for table, name, t in self.slots:
            if table.get(name) is not t:
                return f"{name!r} of a module was replaced"
        for optimizer, state, groups in self.optimizers:
            if optimizer.state is not state or optimizer.param_groups is not groups:
                return "the state of an optimizer was replaced"
        for group, name, value in self.settings:
            if group.get(name) != value:
                return f"{name!r} of an optimizer was changed"
        for i in tensor_leaves:
            storage = leaves[i]._s
            if storage in self.captured or i in self.replaced:
                if self.replaced.get(i) is not storage:
                    return f"argument {i} shares memory with a tensor that the function uses by itself"
        return None


def training_flags(module: torch.nn.Module) -> tuple[bool, ...]:
    """The training flags of a module and all in it."""
    return tuple(m.training for m in module.modules())
