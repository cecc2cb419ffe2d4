"""Traced: lowerings run inside one function that JAX traces. Real storages are never touched while it lasts."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import torch

from .. import errors
from .._storage import Storage
from ..tensor import Tensor
from . import Program
from ._where import failure, user_line

# a number that is an input of the program: its node has `operand()`, its traced value, and a `hint`, what it is now
SYMBOL = torch.SymFloat


class Traced:
    """One trace: what it read without having been given it, what it wrote, what was born in it.

    Attributes:
        captured: storages from outside that were read, with the payloads that they gave.
        values: storages from outside that were written, with their values so far.
        born: storages made while tracing.
        closed: the trace is over; what belongs to it cannot be used any more.
        stop_gradients: JAX differentiates the trace, so that `detach` must stop gradients there.
    """

    stop_gradients = False

    def __init__(self, outer: Any = None, pure: bool = False):
        self.owner = self
        self.outer, self.pure, self.closed = outer, pure, False
        self.captured: dict[Storage, Any] = {}
        self.values: dict[Storage, Any] = {}
        self._born: list[weakref.ref[Storage]] = []
        self._views: dict[Any, tuple[Any, Any, Any]] = {}
        if not pure:
            from .. import _indexing

            _indexing.install()

    def run(self, program: Program, operands: Sequence[Any]) -> Any:
        arrays = [self.read(o) if type(o) is Tensor else o.node.operand() if type(o) is SYMBOL else o for o in operands]
        try:
            return program.fn(*arrays)
        except Exception as error:
            raise failure(error, program.name, arrays) from error

    def read(self, tensor: Tensor) -> Any:
        base, view = self.load(tensor._s), tensor._v
        if view is None:
            return base
        key = (tensor._s, view.chain, *[p if type(p) is int else id(p) for p in view.positions])
        cached = self._views.get(key)
        if cached is None or cached[0] is not base:
            value = view.chain.read.fn(base, *view.positions)
            cached = self._views[key] = (
                base,
                value,
                view.positions,
            )  # positions may be traced: kept, so that their ids are
        return cached[1]

    def write(self, tensor: Tensor, value: Any) -> None:
        storage, view = tensor._s, tensor._v
        if view is not None:
            value = view.chain.write.fn(self.load(storage), value, *view.positions)
        self.store(storage, value)

    def load(self, storage: Storage) -> Any:
        if storage.owner is self:
            return storage.value
        if storage in self.values:
            return self.values[storage]
        if storage in self.captured:
            return self.captured[storage]
        if self.pure:
            raise ImpureTrace
        if self.outer is not None and self.outer.owner is not None:
            value = self.outer.load(storage)
        else:
            value = storage.value
            if storage.owner is not None and storage.owner.closed:
                raise errors.TracerEscaped(
                    f"a tensor made in a traced function is used after its tracing ended{user_line()}; return it from that function"
                )
        self.captured[storage] = value
        return value

    def store(self, storage: Storage, value: Any) -> None:
        if storage.owner is self:
            storage.value = value
        elif self.pure:
            raise ImpureTrace
        else:
            self.load(storage)  # written means captured, too: its old value is what the program starts from
            self.values[storage] = value

    def bear(self, storage: Storage) -> None:
        """Note that `storage` was made in this trace."""
        self._born.append(weakref.ref(storage))

    def born(self) -> list[Storage]:
        """Storages made in this trace that are still alive and hold traced values."""
        return [s for ref in self._born if (s := ref()) is not None and isinstance(s.value, jax.core.Tracer)]


class ImpureTrace(Exception):
    """Raised inside a trace that may only use its arguments (a decomposition) when it reaches for more: it then runs op by op."""
