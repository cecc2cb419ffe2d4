"""Torch code entered from JAX: values converted on the way in and out, ops run inside whatever JAX is tracing."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend.core import get_opaque_trace_state
from torchax import convert
from torchax import random as _random
from torchax._execute import executing, state
from torchax._execute._where import user_line
from torchax._execute.traced import Traced
from torchax._storage import Storage
from torchax.tensor import Tensor

from ._tree import flatten, tree_map, unflatten


class _Local(threading.local):
    inside = False
    noted: dict[int, torch.Tensor] | None = None  # see `noting`
    dry = False


_local = _Local()


def _untraced() -> list[Any]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(get_opaque_trace_state()))  # this one may be inside a trace
    thread.start()
    thread.join()
    return found


_UNTRACED = _untraced()[0]


def under_jax() -> bool:
    """Whether a JAX transformation (`jit`, `grad`, `vmap`, ...) is tracing in this thread."""
    return get_opaque_trace_state() != _UNTRACED


_NEXT_STREAM = np.array([0, 1, 0], np.uint32)


@contextlib.contextmanager
def jax_factories(index: int = 0) -> Iterator[None]:
    """Within, factories that name no device make tensors on device ``jax``, in this thread."""
    if _local.inside:
        yield
        return
    _local.inside = True
    try:
        with torch.device("jax", index) if index else torch.device("jax"):
            yield
    finally:
        _local.inside = False


class Entered(Traced):
    """A stretch of torch code inside a JAX trace. JAX differentiates it; `detach` stops gradients there, too.

    Random numbers come from a stream of their own, and writes to tensors outside end with it: a JAX function has
    nowhere to put them.
    """

    stop_gradients = True

    def __init__(self, outer: Any, given: dict[Storage, Any] | None = None):
        super().__init__(outer=outer)
        self.given = frozenset(given or ())
        self.captured.update(given or {})

    def read(self, tensor: Tensor) -> Any:
        if tensor.requires_grad and _local.noted is not None and not isinstance(tensor._s.owner, Entered):
            root: Any = tensor if tensor.is_leaf or tensor._base is None else tensor._base
            if not self._is_given(root._s):
                _local.noted[id(root)] = root
        return super().read(tensor)

    def _is_given(self, storage: Storage) -> bool:
        trace: Any = self
        while isinstance(trace, Entered):
            if storage in trace.given:
                return True
            trace = trace.outer
        return False

    def load(self, storage: Storage) -> Any:
        if (
            _random._META is not None
            and storage.geometry is _random._META
            and storage.owner is None
            and storage not in self.captured
        ):
            value = self._branch(storage)
            self.captured[storage] = value
            return value
        value = super().load(storage)
        if isinstance(value, np.ndarray):
            value = self.captured[storage] = _device_array(value)
        return value

    def _branch(self, storage: Storage) -> Any:
        """The state of a random source here; outside it goes on with another stream."""
        root: Any = self
        while root.outer is not None and root.outer.owner is not None:
            root = root.outer
        if root is not self and not isinstance(root, Entered):  # a recording: it moves the state on when it ends
            root.branches[storage] = root.branches.get(storage, 0) + 1
            return root.load(storage) + np.array([0, root.branches[storage], 0], np.uint32)
        value = np.asarray(storage.value)
        if _local.dry:
            return _device_array(value)
        storage.value = value + _NEXT_STREAM
        storage.version += 1
        if isinstance(
            jnp.add(np.float32(0), np.float32(0)), jax.core.Tracer
        ):  # under jit; grad and vmap alone run every time
            warnings.warn(
                "random numbers are drawn in a function that JAX traces: every call of the compiled function gets the same "
                f"ones{user_line()}. Use torchax.compile or torchax.interop.jax_jit, which thread the state through",
                UserWarning,
                stacklevel=2,
            )
        return _device_array(value)

    def close(self) -> None:
        """End: what was written outside is lost, or passed on to the trace around."""
        self.closed = True
        changed = [s for s, value in self.values.items() if value is not self.captured.get(s)]
        lost = [s for s in changed if s.geometry is not _random._META]
        if lost:
            shapes = ", ".join(f"{s.geometry.jax_dtype}{list(s.geometry.shape)}" for s in lost[:3])
            warnings.warn(
                f"a function that JAX traces wrote {len(lost)} tensor(s) that it was not given ({shapes}); the new values are "
                "dropped, since JAX functions have no side effects. Pass them in and return them, call module.eval(), or use "
                "torchax.compile",
                UserWarning,
                stacklevel=3,
            )


def _device_array(value: np.ndarray) -> jax.Array:
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return jax.numpy.asarray(np.ascontiguousarray(value).reshape(value.shape))


@contextlib.contextmanager
def noting(dry: bool = False) -> Iterator[dict[int, torch.Tensor]]:
    """Gives a dict that receives, by id, the tensors that entered torch code reads without being given them, and that require gradients.

    Args:
        dry: the code is traced for this alone: it does not take random numbers away from what follows.
    """
    noted, before, was_dry = {}, _local.noted, _local.dry
    _local.noted, _local.dry = noted, dry or was_dry
    try:
        yield noted
    finally:
        _local.noted, _local.dry = before, was_dry
        if before is not None:
            before.update(noted)


def _recording() -> Any:
    """The recording that this thread's traces belong to, if any."""
    root = state.executor
    while getattr(root, "outer", None) is not None:
        root = root.outer
    return root if hasattr(root, "branches") else None


def random_state() -> tuple[Any, int]:
    """Where random numbers stand now, for `same_random`."""
    storage = _random.default(0).storage
    recording = _recording()
    return state.executor.load(storage), 0 if recording is None else recording.branches.get(storage, 0)


@contextlib.contextmanager
def same_random(before: tuple[Any, int]) -> Iterator[None]:
    """Within, entered code draws the numbers that it drew where `before` was taken; what follows is not affected."""
    storage, recording, now = _random.default(0).storage, _recording(), random_state()
    _set_random(storage, recording, before)
    try:
        yield
    finally:
        _set_random(storage, recording, now)


def _set_random(storage: Storage, recording: Any, values: tuple[Any, int]) -> None:
    state.executor.store(storage, values[0])
    if recording is not None:
        recording.branches[storage] = values[1]


def to_tensor(x: Any) -> Any:
    """A `jax.Array` as a tensor, any other leaf as it is (PRNG keys, too: torch has no such dtype)."""
    if isinstance(x, jax.Array):
        return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else Tensor(x)
    return x


def to_array(x: Any) -> Any:
    """A tensor as a `jax.Array` (CPU tensors are copied), any other leaf as it is."""
    if type(x) is Tensor:
        return x._array()
    return convert.t2j(x) if isinstance(x, torch.Tensor) else x


def enter(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[Storage, Any] | None = None
) -> Any:
    """Call `fn`, which takes and gives tensors, with nests of `jax.Array`s; gives nests of `jax.Array`s.

    Args:
        fn: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        given: payloads for tensors from outside that it uses without being given them.
    """
    leaves: list[Any] = []
    spec = flatten((args, kwargs), leaves)
    tracing = state.executor.owner is not None or under_jax()
    tracing = tracing or bool(given) or any(isinstance(x, jax.core.Tracer) for x in leaves)
    if not tracing:
        with jax_factories():
            a, k = unflatten(spec, iter([to_tensor(x) for x in leaves]))
            return tree_map(to_array, fn(*a, **k))
    trace = Entered(state.executor, given)
    try:
        with executing(trace), jax_factories(), jax.enable_x64(True):
            a, k = unflatten(spec, iter([to_tensor(x) for x in leaves]))
            return tree_map(to_array, fn(*a, **k))
    finally:
        trace.close()
