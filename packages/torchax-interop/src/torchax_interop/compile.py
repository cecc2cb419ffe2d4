"""`torchax.compile`: a whole PyTorch function, training steps included, as one XLA program."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torchax._execute import state
from torchax.tensor import Tensor

from ._enter import under_jax
from ._groups import Options
from ._program import Program, assemble
from ._recorder import record
from ._tree import broadcast_prefix, flatten

_LIMIT = 16  # programs kept for one signature; the world around changes more often than that: the oldest goes


class CacheInfo(NamedTuple):
    """What `Compiled.cache_info` gives: calls served by a program, recordings made, programs held."""

    hits: int
    misses: int
    programs: int


class Compiled:
    """A function that is recorded once per signature and runs as one XLA program; made by `compile` and `jax_jit`."""

    def __init__(self, fn: Callable[..., Any], **options: Any):
        if not callable(fn):
            raise TypeError(f"torchax.compile takes a function or a module; got {type(fn).__name__}")
        self.fn = fn
        self._jit = _JitOptions(fn, options)
        self._cache: dict[Any, list[Program]] = {}
        self._once: dict[Any, int] = {}
        self._known: dict[int, Tensor] = {}
        self._lock = threading.RLock()
        self._hits = self._misses = 0
        if hasattr(fn, "__name__"):
            functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if state.executor.owner is not None or under_jax():
            return self.fn(*args, **kwargs)  # part of what is being traced already
        leaves: list[Any] = []
        objects: list[Any] = []
        spec = flatten((args, kwargs), leaves, None, objects)
        key = (spec, *_mode(), *[_key_of(x) for x in leaves], *_aliases(leaves))
        with self._lock:
            programs = self._cache.get(key)
            if programs is not None:
                for program in programs:
                    if program.misfit(leaves) is None:
                        self._hits += 1
                        return assemble(program, program.execute(leaves), objects)
            self._misses += 1
            program, results = record(
                self.fn, leaves, spec, self._jit.options(args, kwargs, spec), list(self._known.values())
            )
            self._known.update((id(t), t) for t in program.tensors)
            self._keep(key, program)
            return assemble(program, results, objects)

    def _keep(self, key: Any, program: Program) -> None:
        # a first call that leaves new tensors behind (an optimizer's state, a cached mask) is not like those that follow
        if not program.settled and self._once.setdefault(key, 0) < 1:
            self._once[key] += 1
            return
        programs = self._cache.setdefault(key, [])
        programs.insert(0, program)
        del programs[_LIMIT:]

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def cache_info(self) -> CacheInfo:
        """How often it was recorded, and how often a program was found."""
        return CacheInfo(self._hits, self._misses, sum(map(len, self._cache.values())))

    def cache_clear(self) -> None:
        """Forget all programs."""
        with self._lock:
            self._cache.clear()
            self._once.clear()
            self._hits = self._misses = 0


# ---------------------------------------------------------------------- keys
_STATIC = (int, float, bool, str, type(None), complex, bytes, torch.dtype, torch.device)


class _Identity:
    """An object as part of a key: the same only as itself."""

    __slots__ = ("x",)

    def __init__(self, x: Any):
        self.x = x

    def __hash__(self) -> int:
        return id(self.x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.x is self.x


def _key_of(x: Any) -> Any:
    kind = type(x)
    if kind is Tensor:
        return (x._m, x.is_leaf) if x.requires_grad else x._m
    if kind in _STATIC:
        return kind, x
    if isinstance(x, torch.Tensor):
        return "cpu", tuple(x.shape), x.dtype, x.requires_grad, x.device
    if isinstance(x, jax.Array):
        return "array", x.aval
    if isinstance(x, np.ndarray):
        return "numpy", x.shape, x.dtype, x.tobytes() if x.dtype != object else _Identity(x)
    try:
        hash(x)
    except TypeError:
        return _Identity(x)
    return kind, x


def _mode() -> tuple[Any, ...]:
    autocast = torch.get_autocast_dtype("jax") if torch.is_autocast_enabled("jax") else None
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )


def _aliases(leaves: list[Any]) -> tuple[Any, ...]:
    """Which tensors among the arguments share memory, and how they view it."""
    storages = [x._s for x in leaves if type(x) is Tensor]
    if len(set(storages)) == len(storages):
        return ()
    place: dict[Any, int] = {}
    views = []
    for x in leaves:
        if type(x) is Tensor:
            views.append((place.setdefault(x._s, len(place)), None if x._v is None else (x._v.chain, x._v.positions)))
    geometry = tuple(s.geometry for s in place)
    return geometry, tuple(views)


# ---------------------------------------------------------------------- options of jax.jit
class _JitOptions:
    """Options in the terms of the function's arguments, turned into those of a program."""

    def __init__(self, fn: Callable[..., Any], options: dict[str, Any]):
        self.donate_state = options.pop("donate_state", True)
        self.static = _names(fn, options.pop("static_argnums", None), options.pop("static_argnames", None))
        self.donate = _names(fn, options.pop("donate_argnums", None), options.pop("donate_argnames", None))
        self.in_shardings = options.pop("in_shardings", None)
        self.out_shardings = options.pop("out_shardings", None)
        known = {"keep_unused", "device", "backend", "inline", "compiler_options"}
        if unknown := set(options) - known:
            raise TypeError(
                f"unknown option(s) {', '.join(sorted(unknown))}; jax.jit's options and donate_state are taken"
            )
        self.rest = options

    def options(self, args: tuple[Any, ...], kwargs: dict[str, Any], spec: Any) -> Options:
        numbers, names = self.donate
        donated = self._leaves_of(args, kwargs, spec, numbers, names) if numbers or names else frozenset()
        shardings = None
        if self.in_shardings is not None:
            is_leaf = lambda s: s is None or isinstance(s, jax.sharding.Sharding)
            shardings = broadcast_prefix(self.in_shardings, spec[1][0], is_leaf) + [None] * len(flat_leaves(kwargs))
        return Options(self.donate_state, donated.__contains__, shardings, self.out_shardings, self.rest)

    @staticmethod
    def _leaves_of(
        args: tuple[Any, ...], kwargs: dict[str, Any], spec: Any, numbers: Any, names: Any
    ) -> frozenset[int]:
        found, position = set(), 0
        for name, x in [*enumerate(args), *kwargs.items()]:
            n = len(flat_leaves(x))
            if name in numbers or name in names or (isinstance(name, int) and name - len(args) in numbers):
                found.update(range(position, position + n))
            position += n
        return frozenset(found)


def flat_leaves(x: Any) -> list[Any]:
    """The leaves of a nest."""
    leaves: list[Any] = []
    flatten(x, leaves)
    return leaves


def _names(fn: Callable[..., Any], numbers: Any, names: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Positions and names of chosen arguments, each completed from the other through the signature."""
    numbers = {numbers} if isinstance(numbers, int) else set(numbers or ())
    names = {names} if isinstance(names, str) else set(names or ())
    if numbers or names:
        try:
            parameters = list(inspect.signature(fn).parameters)
        except (TypeError, ValueError):
            parameters = []
        more = {i for i, name in enumerate(parameters) if name in names}
        names |= {parameters[i] for i in numbers if -len(parameters) <= i < len(parameters)}
        numbers |= more
    return frozenset(numbers), frozenset(names)


# ---------------------------------------------------------------------- public
def compile(fn: Any = None, **options: Any) -> Any:
    """A function or module that runs as one XLA program per signature.

    The function is ordinary PyTorch: it may call modules, `backward()`, `optimizer.step()`, write into tensors and draw
    random numbers. It is recorded when it is called with new shapes, dtypes or static arguments, in another grad or
    autocast mode, or when something that it depends on has changed (training flags, `requires_grad`, replaced
    parameters, settings of an optimizer other than ``lr``). Tensors that it uses without being given them are inputs of the
    program, those that it writes are outputs; results carry gradients as they do eagerly. Python code inside runs while
    recording only.

    The first call may be recorded a second time on the next call, when it left new tensors behind (the state of an
    optimizer). CPU tensors among the arguments are copied to the device at each call and are jax tensors inside; other
    CPU tensors are constants. Arguments that are not tensors are static: each new value is a new recording.

    Args:
        fn: the function or `torch.nn.Module`; None gives a decorator.
        options: ``donate_state=False`` keeps the old buffers of what is written alive; further ones as for `jax.jit`
            (``donate_argnums``, ``in_shardings``, ...), in terms of the function's own arguments.

    Returns:
        A `Compiled`; for a module, a module of the same class that shares everything with it.

    Raises:
        TracerEscaped: (when called) the function asks for the value of a tensor, as ``if x > 0`` and ``.item()`` do.
        DataDependentShape: (when called) the shape of a result depends on values.
    """
    if fn is None:
        return functools.partial(compile, **options)
    if isinstance(fn, torch.nn.Module):
        return _compile_module(fn, options)
    return Compiled(fn, **options)


def _compile_module(module: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module:
    kind = type(module)
    compiled = Compiled(_ModuleCall(module), **options)

    class CompiledModule(kind):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **kwargs)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return _compile_module(copy.deepcopy(module, memo), options)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _compile_module, (module, options)

        cache_info = staticmethod(compiled.cache_info)
        cache_clear = staticmethod(compiled.cache_clear)

    CompiledModule.__name__, CompiledModule.__qualname__, CompiledModule.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    CompiledModule.__doc__ = kind.__doc__
    twin = object.__new__(CompiledModule)
    object.__setattr__(twin, "__dict__", module.__dict__)  # one and the same: parameters, training flag, hooks
    return twin


class _ModuleCall:
    """The module's own call, for `Compiled`."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


__all__ = ["Compiled", "compile"]
