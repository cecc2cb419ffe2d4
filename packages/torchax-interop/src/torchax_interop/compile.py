"""`torchax.compile`: a whole PyTorch function, training steps included, as one XLA program."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import torch
from torchax import errors
from torchax._execute import state
from torchax._execute._where import user_line
from torchax.tensor import Tensor

from ._buckets import Buckets
from ._enter import under_jax
from ._generate import Generation, generation
from ._groups import Options
from ._guards import GRADIENT, OF_OPTIMIZER
from ._keys import Key, differences, key_of_call
from ._plain import NUMBER
from ._program import Program, assemble
from ._recorder import record
from ._tree import broadcast_prefix, flatten

_LIMIT = 16  # programs kept for one signature; the world around changes more often than that: the oldest goes
_REASONS = 100  # that `cache_info` remembers
_OFTEN = 7  # recordings because of Python numbers, without a word about it
_COUNTER = (
    "{} changes {!r}, a Python number or a buffer on CPU. That happens while it is recorded only: calls of the compiled program "
    "leave it as it is. Count outside of it, or in a tensor on device jax"
)


class CacheInfo(NamedTuple):
    """What `Compiled.cache_info` gives.

    Attributes:
        hits: calls served by a program.
        misses: recordings made.
        programs: programs held.
        reasons: for every recording after the first, what was different, in words (the last 100); and why `generate` ran
            through transformers' own loop.
    """

    hits: int
    misses: int
    programs: int
    reasons: tuple[str, ...] = ()


class Compiled:
    """A function that is recorded once per signature and runs as one XLA program; made by `compile` and `jax_jit`.

    Attributes:
        on_retrace: what happens when a call needs another recording: ``"ignore"``, ``"warn"`` or ``"error"``.
    """

    def __init__(self, fn: Callable[..., Any], **options: Any):
        if not callable(fn):
            raise TypeError(f"torchax.compile takes a function or a module; got {type(fn).__name__}")
        self.fn = fn
        self.on_retrace = options.pop("on_retrace", "ignore")
        dynamic = options.pop("dynamic", None)
        self._buckets = None if dynamic is None else Buckets(fn, dynamic)
        self._jit = _JitOptions(fn, options)
        self._cache: dict[Key, list[Program]] = {}
        self._once: set[Key] = set()
        self._keys: dict[Key, None] = {}  # of recordings, the latest last
        self._reasons: list[str] = []
        self._known: dict[int, Tensor] = {}
        self._lock = threading.RLock()
        self._hits = self._misses = 0
        self._warned_of_numbers = False
        if hasattr(fn, "__name__"):
            functools.update_wrapper(self, fn)

    @property
    def on_retrace(self) -> str:
        return self._on_retrace

    @on_retrace.setter
    def on_retrace(self, value: str) -> None:
        if value not in ("ignore", "warn", "error"):
            raise ValueError(f'on_retrace is "ignore", "warn" or "error"; got {value!r}')
        self._on_retrace = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if state.executor.owner is not None or under_jax():
            return self.fn(*args, **kwargs)  # part of what is being traced already
        if self._buckets is not None:
            return self._buckets.call(self._call, args, kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        leaves: list[Any] = []
        objects: list[Any] = []
        spec = flatten((args, kwargs), leaves, None, objects)
        key = key_of_call(spec, leaves)
        with self._lock:
            programs = self._cache.get(key)
            if programs is not None:
                for program in programs:
                    if program.misfit(leaves) is None:
                        self._hits += 1
                        return assemble(program, program.execute(leaves), objects)
            if self._misses:
                self._explain(key, leaves)
            self._misses += 1
            self._keys.pop(key, None)
            self._keys[key] = None
            program, results = record(
                self.fn, leaves, spec, self._jit.options(args, kwargs, spec), list(self._known.values())
            )
            self._known.update((id(t), t) for t in program.tensors)
            self._keep(key, program)
            if program.changed_numbers and not self._warned_of_numbers:
                self._warned_of_numbers = True
                warnings.warn(_COUNTER.format(self._name(), *program.changed_numbers[:1]), UserWarning, stacklevel=3)
            return assemble(program, results, objects)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The XLA program of a call with these arguments, as `jax.jit`'s ``lower``: recorded, but not run or kept.

        Of a result that carries gradients it is the forward program. ``.compile()`` gives ``memory_analysis()``, ``cost_analysis()``
        and ``as_text()``. A step that makes its optimizer's state in its first call is best called once before.
        """
        leaves: list[Any] = []
        spec = flatten((args, kwargs), leaves, None, [])
        options = self._jit.options(args, kwargs, spec)
        with self._lock:
            return record(self.fn, leaves, spec, options, list(self._known.values()), Program.lower)[1]

    def _keep(self, key: Key, program: Program) -> None:
        # a first call that leaves new tensors behind (an optimizer's state, a cached mask) is not like those that follow
        if not program.settled and key not in self._once:
            self._once.add(key)
            return
        programs = self._cache.setdefault(key, [])
        programs.insert(0, program)
        del programs[_LIMIT:]

    def _explain(self, key: Key, leaves: list[Any]) -> None:
        """Note why there is another recording; warn or refuse, as was asked."""
        programs = self._cache.get(key)
        expected = False
        if programs:
            reason = programs[0].misfit(leaves) or "something that it depends on has changed"
            expected = reason == GRADIENT and len(programs) == 1  # which the first call has made
        elif key in self._once:
            expected = True
            reason = (
                "the first call made tensors that stay (an optimizer's state, a cache): recorded once more with them"
            )
        elif key in self._keys:
            reason = "the last recording with these arguments raised an exception"
            expected = True
        else:
            nearest = min(reversed(self._keys), key=lambda old: (old[0] != key[0], len(differences(old, key))))
            reason = "; ".join(differences(nearest, key))
        changing = lambda r: NUMBER in r or OF_OPTIMIZER in r
        often = changing(reason) and sum(map(changing, self._reasons)) == _OFTEN
        if often or (not expected and self._on_retrace != "ignore"):
            message = f"{self._name()} is recorded and compiled again{user_line()}: {reason}"
            if self._on_retrace == "error":
                raise errors.Retraced(f'{message}. on_retrace="error" forbids that')
            if often:
                message += (
                    f", for the {_OFTEN + 1}th time. A number that changes so often is better a tensor on device jax"
                )
            warnings.warn(message, UserWarning, stacklevel=3)
        self._reasons.append(reason)
        del self._reasons[:-_REASONS]

    def _name(self) -> str:
        return getattr(self.fn, "__qualname__", type(self.fn).__name__)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def cache_info(self) -> CacheInfo:
        """How often it was recorded and why, and how often a program was found."""
        return CacheInfo(self._hits, self._misses, sum(map(len, self._cache.values())), tuple(self._reasons))

    def cache_clear(self) -> None:
        """Forget all programs."""
        with self._lock:
            self._cache.clear()
            self._once.clear()
            self._keys.clear()
            self._reasons.clear()
            self._hits = self._misses = 0


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
                f"unknown option(s) {', '.join(sorted(unknown))}; on_retrace, dynamic, donate_state and jax.jit's options are "
                "taken"
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
@dataclasses.dataclass
class CompileOptions:
    """Options of `compile` as earlier versions took them.

    Attributes:
        methods_to_compile: methods of a module whose calls are compiled, too.
        jax_jit_kwargs: options of `jax.jit`.
        mode: ``"jax"``, the only one.
    """

    methods_to_compile: Sequence[str] = ("forward",)
    jax_jit_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    mode: str = "jax"

    def __post_init__(self) -> None:
        if self.mode != "jax":
            raise ValueError(f'mode is "jax"; got {self.mode!r}. To export, use torchax.export.export')


def compile(fn: Any = None, former: CompileOptions | None = None, /, **options: Any) -> Any:
    """A function or module that runs as one XLA program per signature.

    The function is ordinary PyTorch: it may call modules, `backward()`, `optimizer.step()`, write into tensors and draw
    random numbers. It is recorded when it is called with new shapes, dtypes or static arguments, in another grad or
    autocast mode, or when something that it depends on has changed (training flags, `requires_grad`, replaced
    parameters, settings of an optimizer that are no floats). Tensors that it uses without being given them are inputs of the
    program, those that it writes are outputs; results carry gradients as they do eagerly. Python code inside runs while
    recording only.

    The first call may be recorded a second time on the next call, when it left new tensors behind (the state of an
    optimizer). CPU tensors among the arguments are copied to the device at each call and are jax tensors inside; other
    CPU tensors are constants. Arguments that are not tensors are static: each new value is a new recording.

    Args:
        fn: the function or `torch.nn.Module`; None gives a decorator.
        former: `CompileOptions`, as earlier versions took them: a module becomes a `JittableModule`, with ``params`` and ``buffers``.
        options: ``on_retrace="warn"`` or ``"error"`` says or refuses when a call needs another recording, and why (see also
            `Compiled.cache_info`). ``dynamic={0: (32, 64, 128)}`` pads tensors among the arguments with zeros to the next of
            these sizes in dimension 0, and cuts the results (see docs/compile.md). ``donate_state=False`` keeps the old
            buffers of what is written alive; further ones as for `jax.jit` (``donate_argnums``, ``in_shardings``, ...), in
            terms of the function's own arguments.

    Returns:
        A `Compiled`; for a module, a module of the same class that shares everything with it.

    Raises:
        TracerEscaped: (when called) the function asks for the value of a tensor, as ``if x > 0`` and ``.item()`` do.
        DataDependentShape: (when called) the shape of a result depends on values.
        Retraced: (when called) ``on_retrace="error"``, and no program serves the call.
        ValueError: (when called) a dimension is larger than its largest bucket.
    """
    if former is not None:
        from .jit import compile_with  # which needs this module

        return compile_with(fn, former)
    if fn is None:
        return functools.partial(compile, **options)
    if isinstance(fn, torch.nn.Module):
        return _compile_module(fn, options)
    return Compiled(fn, **options)


def _compile_module(module: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module:
    kind = type(module)
    compiled = Compiled(_ModuleCall(module), **options)
    tokens = generation(kind, options)

    class CompiledModule(kind):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **kwargs)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return _compile_module(copy.deepcopy(module, memo), options)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _compile_module, (module, options)

        if tokens is not None:

            def _sample(self, *args: Any, **kwargs: Any) -> Any:
                return tokens.sample(super()._sample, *args, **kwargs)  # type: ignore[misc]

        cache_info = staticmethod(functools.partial(_total, compiled, tokens))
        cache_clear = staticmethod(functools.partial(_clear, compiled, tokens))
        lower = staticmethod(compiled.lower)

    CompiledModule.__name__, CompiledModule.__qualname__, CompiledModule.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    CompiledModule.__doc__ = kind.__doc__
    twin = object.__new__(CompiledModule)
    object.__setattr__(twin, "__dict__", module.__dict__)  # one and the same: parameters, training flag, hooks
    if tokens is not None:
        tokens.model = twin
    return twin


def _total(compiled: Compiled, tokens: Generation | None) -> CacheInfo:
    """Of a module's own calls and of `generate` together."""
    if tokens is None:
        return compiled.cache_info()
    infos = [p.cache_info() for p in (compiled, *tokens.programs)]
    reasons = [r for i in infos for r in i.reasons]
    hits, misses, programs = (sum(getattr(i, name) for i in infos) for name in ("hits", "misses", "programs"))
    return CacheInfo(hits, misses, programs, (*reasons, *tokens.refusals))


def _clear(compiled: Compiled, tokens: Generation | None) -> None:
    compiled.cache_clear()
    if tokens is not None:
        tokens.clear()


class _ModuleCall:
    """The module's own call, for `Compiled`."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


__all__ = ["CompileOptions", "Compiled", "compile"]
