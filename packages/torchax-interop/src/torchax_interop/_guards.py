"""What a program took for granted about the world around it, in a form that is checked in a few microseconds."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torchax._marks import marks
from torchax._sharding import pins
from torchax._storage import Storage
from torchax.tensor import Tensor

from ._plain import ModuleFacts
from ._reach import Places
from ._recording import Recording
from ._symbolic import Setting

_storage_of = operator.attrgetter("_s")
_left_of = operator.attrgetter("left")
_training_of = operator.itemgetter("training")
_requires_grad_of = operator.attrgetter("requires_grad")
_grad_of = operator.attrgetter("grad")
GRADIENT = "a parameter has a gradient now"
OF_OPTIMIZER = "of an optimizer went from"
try:  # not public, and not needed
    from torch._C._dynamo import guards as _guards
except ImportError:
    _guards = None
plain_attributes = torch._C.DisableTorchFunctionSubclass  # within, torch's attributes are read twice as fast


class Guards:
    """See the module.

    Args:
        recording: the call that was recorded, still open.
        grads: parameter (by id) -> (parameter, gradient before the call), of those whose gradients matter.
        places: where the function finds what it depends on.
    """

    def __init__(self, recording: Recording, grads: dict[int, tuple[torch.Tensor, Any]], places: Places):
        noted = list(recording.modules.values())
        modules = [m.module for m in noted]
        self.modules = [m.__dict__ for m in modules]
        self.training = [m.training for m in noted]
        self.tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
        known = set(map(id, modules))
        for m in {id(c): c for root in (*modules, *places.modules) for c in root.modules()}.values():
            self.tables += [table for table in (m._modules, m._parameters if id(m) not in known else None) if table]
        self.sizes = list(map(len, self.tables))
        self.members = [t for table in self.tables for t in table.values()]
        self.tensors = list(recording.tensors.values())
        asked = torch.is_grad_enabled()  # who requires a gradient; else nobody asks
        self.differentiated = self.tensors if asked else []
        self.requires_grad = [t.requires_grad for t in self.differentiated]
        self.unchanged = _unchanged(self.differentiated)
        plain = list(recording.plain.values())
        self.read = list({*recording.captured, *map(_storage_of, (*self.tensors, *plain))})
        self.left = list(map(_left_of, self.read))
        self.plain = [t for t in plain if asked and not t.requires_grad]
        self.compared: Any = None  # the mark under which these were looked at
        self.settings = recording.settings
        self.numbers, self.checks = recording.numbers, recording.checks
        self.optimizers = list(recording.optimizers.values())
        self.parameters = [x for _, _, groups in self.optimizers for x in (groups, *(g["params"] for g in groups))]
        self.lengths = list(map(len, self.parameters))
        # a gradient that was replaced unread does not matter
        self.without_grad = [t for t, g in grads.values() if g is None]
        captured = recording.captured
        exact = [(t, g) for t, g in grads.values() if type(g) is Tensor and g._s in captured]
        self.with_grad, self.exact_grads = [t for t, _ in exact], [g for _, g in exact]
        self.looked: Any = None  # the mark under which gradients were looked at
        self.captured: frozenset[Storage] = frozenset(captured)
        self.replaced: dict[int, Storage] = {}
        self.places = places
        self.facts = ModuleFacts([(m.module, m.attributes) for m in noted], self.tensors)
        self.pinned: list[tuple[Storage, Any]] = []
        self.epoch = pins.epoch

    def watch_layout(self, storages: list[Storage]) -> None:
        """The program takes for granted how these storages are laid out over devices."""
        self.pinned, self.epoch = [(s, s.sharding) for s in storages], pins.epoch

    def failure(self, leaves: list[Any], tensor_leaves: list[int]) -> str | None:
        """Why the program does not fit, in words; None where it does."""
        if self.epoch != pins.epoch:
            if any(s.sharding != sharding for s, sharding in self.pinned):
                return "a tensor that the function uses was laid out anew over devices"
            self.epoch = pins.epoch
        # not by the mark: a function may cease to require a gradient unmarked
        if not self.unchanged(*self.differentiated):
            with plain_attributes():
                if list(map(_requires_grad_of, self.differentiated)) != self.requires_grad:
                    return "requires_grad of a parameter was changed"
        if self.looked is not marks.grads:
            mark = marks.grads
            with plain_attributes():
                if not all(map(operator.is_, map(_grad_of, self.without_grad), itertools.repeat(None))):
                    return GRADIENT
                if not all(map(operator.is_, map(_grad_of, self.with_grad), self.exact_grads)):
                    return "the gradient of a parameter was replaced"
            self.looked = mark
        if self.compared is not marks.tensors:
            mark = marks.tensors
            if list(map(_left_of, self.read)) != self.left:
                return "a tensor that the function uses got another storage"
            with plain_attributes():
                if any(map(_requires_grad_of, self.plain)):
                    return "a tensor that the function uses requires a gradient now"
            self.compared = mark
        if list(map(_training_of, self.modules)) != self.training:
            return "a module was switched between training and evaluation"
        now = itertools.chain.from_iterable(map(dict.values, self.tables))
        if list(map(len, self.tables)) != self.sizes or not all(map(operator.is_, now, self.members)):
            return "a parameter, buffer or submodule of a module was replaced"
        if (lost := self.places.lost()) or (lost := self.facts.failure()):
            return lost
        for optimizer, state, groups in self.optimizers:
            if optimizer.state is not state or optimizer.param_groups is not groups:
                return "the state of an optimizer was replaced"
        if list(map(len, self.parameters)) != self.lengths:
            return "an optimizer has more parameters, or fewer, than before"
        for group, name, value in self.settings:
            if group.get(name) != value:
                return f"{name!r} {OF_OPTIMIZER} {value!r} to {group.get(name)!r}"
        for number in self.numbers:
            if number.group.get(number.name) is not number.seen and (lost := self._asked_again()):
                return lost
        for i in tensor_leaves:
            storage = leaves[i]._s
            if (storage in self.captured or i in self.replaced) and self.replaced.get(i) is not storage:
                return f"argument {i} shares memory with a tensor that the function uses by itself"
        return None

    def _asked_again(self) -> str | None:
        """Whether numbers of optimizers have changed so that Python would go another way with them; in words."""
        changed: list[Setting] = [n for n in self.numbers if n.group.get(n.name) is not n.seen]
        wrong = [n for n in changed if not n.fits()]
        if not wrong:
            failed = [c for c in self.checks if not c.settings.isdisjoint(changed) and not c.holds()]
            wrong = [n for n in changed if any(n in c.settings for c in failed)]
        if wrong:
            number = wrong[0]
            return f"{number.name!r} {OF_OPTIMIZER} {number.last()!r} to {number.group.get(number.name)!r}"
        for number in changed:
            number.refresh()
        return None


def _unchanged(tensors: list[Tensor]) -> Callable[..., bool]:
    """Whether the tensors are as they are now in what torch knows of them, `requires_grad` included; False may mean anything.

    In C++ that takes a fraction of the time of asking each in Python.
    """
    checks: Any = getattr(_guards, "TensorGuards", None)
    if checks is None or not tensors:
        return lambda *tensors: not tensors
    sizes, strides = [list(t._m.shape) for t in tensors], [list(t._m.strides) for t in tensors]
    return checks(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
