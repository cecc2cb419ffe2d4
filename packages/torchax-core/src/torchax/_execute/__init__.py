"""How a lowering is run, and who reads and writes a storage's payload: one interface, several ways behind it.

`strict` runs each op as a compiled program of its own; `traced` runs lowerings inside one function that JAX traces.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

from ._room import make_room

if TYPE_CHECKING:
    from .._storage import Storage
    from ..tensor import Tensor


class Program:
    """A function over arrays, and its compiled form.

    Attributes:
        fn: the function; called directly while tracing.
        jitted: its compiled form (that of `eager` where it differs), whose results never share a buffer with operands (a later donation would free both).
        name: the op, for messages.
        wide: 64-bit values or Python numbers take part: it must run in JAX's 64-bit mode.
        index: the device that it computes on, where that is not the first one.
    """

    __slots__ = ("fn", "index", "jitted", "name", "wide")

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        wide: bool = True,
        index: int = 0,
        eager: Callable[..., Any] | None = None,
    ):
        self.fn, self.name, self.wide, self.index = fn, name, wide, index
        compiled = eager or fn

        def run(*operands: Any) -> Any:
            out = compiled(*operands)
            taken = {id(o) for o in operands}
            return jax.tree.map(lambda x: jnp.copy(x) if id(x) in taken else x, out)

        run.__name__ = name.replace("::", "_").replace(".", "_")  # shows in profiles and HLO
        # what is computed without arrays of that device, too, must lie there
        placement = jax.sharding.SingleDeviceSharding(jax.local_devices()[index]) if index else None
        self.jitted = jax.jit(run, out_shardings=placement)
        if state.executor is not None and state.executor.owner is None:  # nothing is being traced
            make_room()


class Executor(Protocol):
    """A way to run lowerings. `owner` is what new storages belong to (None when their values outlive everything)."""

    owner: Any

    def run(self, program: Program, operands: Sequence[Any]) -> Any:
        """Run `program` on operands: Tensors, numbers, numpy arrays. Gives its raw results."""
        ...

    def read(self, tensor: Tensor) -> Any:
        """The tensor's value, through its view."""
        ...

    def write(self, tensor: Tensor, value: Any) -> None:
        """Make `value` (of the tensor's shape and dtype) the tensor's value, through its view."""
        ...

    def load(self, storage: Storage) -> Any:
        """The storage's payload."""
        ...

    def store(self, storage: Storage, value: Any) -> None:
        """Replace the storage's payload."""
        ...


class _State(threading.local):
    executor: Any = None  # set by strict.py at class level, so that every thread starts with it


state = _State()


@contextlib.contextmanager
def executing(executor: Executor) -> Iterator[None]:
    """Within, this thread runs its ops through `executor`."""
    previous = state.__dict__.get("executor")
    state.executor = executor
    try:
        yield
    finally:
        if previous is None:  # back to the default, which may change meanwhile
            del state.executor
        else:
            state.executor = previous


def set_default(executor: Executor) -> None:
    """Make `executor` what every thread starts with (and this one uses, unless it is tracing)."""
    _State.executor = executor


def is_tracing() -> bool:
    """Whether this thread is tracing a function into a program."""
    return state.executor.owner is not None
