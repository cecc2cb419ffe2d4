"""Recording a call of a torch function: which tensors it reads without being given them, which it writes, which it makes.

While it lasts, a storage from outside hands out its concrete array, which `jax.make_jaxpr` keeps as a constant *by
identity*; afterwards those constants become inputs of the program, and written storages become outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torchax._execute import executing, state
from torchax._execute.strict import STRICT
from torchax._execute.traced import Traced
from torchax._storage import Storage
from torchax.tensor import Tensor

from ._plain import attributes_of
from ._symbolic import Check, Setting

_STEP = np.array([0, 0, 1], np.uint32)


class NotDifferentiable(RuntimeError):
    """A gradient was asked for that does not exist."""


class Noted(NamedTuple):
    """A module that was called, with its training flag, buffers and attributes (see `attributes_of`) before the call."""

    module: torch.nn.Module
    training: bool
    buffers: dict[str, Any]
    attributes: dict[str, Any]


class Recording(Traced):
    """One recorded call.

    Attributes:
        given: storages of arguments -> the storages that stand for them inside.
        given_read: those of them that the function also reached by itself.
        tensors: parameters, and leaves that require a gradient, from outside that were read (by id).
        computed: results, from outside, of something that autograd has noted (by id).
        plain: other tensors from outside (by id).
        modules: modules that were called, as they were at that time (by id).
        settings: settings of optimizers that the program depends on: (dict, name, value).
        numbers: settings that are inputs.
        checks: what Python has asked about these.
        groups: entries of groups of optimizers that were known before the call (by id of the group).
        undo: called, last first, when the function raises.
        branches: random sources -> number of streams handed to JAX functions inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[Storage, Storage] = {}
        self.given_read: set[Storage] = set()
        self.tensors: dict[int, Tensor] = {}
        self.computed: dict[int, Tensor] = {}
        self.plain: dict[int, Tensor] = {}
        self.modules: dict[int, Noted] = {}
        self.settings: list[tuple[dict[str, Any], str, Any]] = []
        self.numbers: list[Setting] = []
        self.checks: list[Check] = []
        self.groups: dict[int, dict[str, Any]] = {}
        self.optimizers: dict[int, tuple[Any, Any, Any]] = {}
        self.undo: list[Callable[[], None]] = []
        self.branches: dict[Storage, int] = {}
        self._payloads: set[int] = set()

    def read(self, tensor: Tensor) -> Any:
        self.note(tensor)
        return super().read(tensor)

    def note(self, tensor: Tensor) -> None:
        """Remember a parameter from outside that is read, perhaps through a view."""
        if tensor._base is not None and type(tensor._base) is Tensor:  # a backward reads views of what was saved
            tensor = tensor._base
        known = tensor._s.owner is not None or id(tensor) in self.tensors
        if not known and tensor.is_leaf and (tensor.requires_grad or getattr(tensor, "_is_param", False)):
            self.tensors[id(tensor)] = tensor
        elif not known and tensor.requires_grad and torch.is_grad_enabled():
            self.computed[id(tensor)] = tensor
        elif not known and (tensor._v is None or not tensor._v.is_traced):
            self.plain[id(tensor)] = tensor

    def load(self, storage: Storage) -> Any:
        if storage.owner is self:
            return storage.value
        inner = self.given.get(storage)
        if inner is not None:
            self.given_read.add(storage)
            return inner.value
        if storage not in self.captured:
            self._make_distinct(storage)
        return super().load(storage)

    def store(self, storage: Storage, value: Any) -> None:
        inner = self.given.get(storage)
        if inner is not None:
            self.given_read.add(storage)
            inner.value = value
        else:
            super().store(storage, value)

    def _make_distinct(self, storage: Storage) -> None:
        """Give the storage a payload that is a `jax.Array` and nobody else's: constants are told apart by identity."""
        value = storage.value
        if isinstance(value, jax.core.Tracer):
            return
        if not isinstance(value, jax.Array):
            storage.value = concrete(value)
        elif id(value) in self._payloads:
            with jax.ensure_compile_time_eval(), jax.enable_x64(True):
                storage.value = jnp.copy(value)
        self._payloads.add(id(storage.value))

    def finish_random(self) -> None:
        """Move on the random sources that JAX functions inside took streams from."""
        for storage in self.branches:
            self.store(storage, self.load(storage) + _STEP)


def concrete(value: Any) -> jax.Array:
    """A `jax.Array` of its own with the value, whatever is being traced."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return jnp.array(np.asarray(value))


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Within a recording: ops run at once, on real tensors."""
    with executing(STRICT), jax.ensure_compile_time_eval():
        yield


@contextlib.contextmanager
def noting_modules(recording: Recording) -> Iterator[None]:
    """Within, modules called in this thread are noted in the recording."""

    def note(module: torch.nn.Module, args: Any) -> None:
        if id(module) not in recording.modules and _current() is recording:
            recording.modules[id(module)] = Noted(
                module,
                module.training,
                {k: b for k, b in module._buffers.items() if type(b) is Tensor and b._s.owner is None},
                attributes_of(module),
            )

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _current() -> Any:
    """The recording of this thread, also from within traces inside it."""
    executor = state.executor
    while executor is not None and not isinstance(executor, Recording):
        executor = getattr(executor, "outer", None)
    return executor


def current() -> Recording | None:
    """The recording of this thread, if any."""
    return _current()
