"""The rule of most ops: values in, values out, one cached program per signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map

from . import convert, dtypes, errors, random
from ._checks import Check, checked, settle, wait_for
from ._dispatch import RULES
from ._execute import Program, state
from ._execute.traced import SYMBOL, ImpureTrace
from ._foreach import foreach_apply, foreach_element
from ._infer import NoMeta, column_major, cpu_error, in_memory_format_of, infer, infer_by_shape
from ._lower import Apply, decomposed, decomposition, is_composite_implicit, lowered, op_by_op
from ._missing import missing
from ._placing import device_index
from ._precision import setting
from ._registry import REGISTRY, Lowering
from ._rehearsal import refused
from ._signature import DROPPED, Signature, place
from ._storage import Storage, TensorMeta, dense_meta, meta_of, numpy_strides
from .config import config
from .tensor import Tensor, make, wrap


class Entry:
    """A call signature, resolved: the program and the metadata of its results.

    Attributes:
        program: runs the lowering; None for one that must run on concrete arrays.
        apply: the same over (args, kwargs) with arrays in place of tensors.
        metas: `TensorMeta` of a single result, else a nest of them.
        single: whether there is a single result.
        kind: ``functional``, ``dynamic``, ``stateful`` or ``op by op``.
    """

    __slots__ = (
        "apply",
        "checks",
        "dynamic",
        "index",
        "lowering",
        "metas",
        "operand_kinds",
        "plain",
        "program",
        "single",
        "template",
    )

    def __init__(
        self, program: Program | None, apply: Apply, metas: Any, template: Any, index: int, lowering: Lowering | None
    ):
        self.program, self.apply, self.metas, self.template, self.index, self.lowering = (
            program,
            apply,
            metas,
            template,
            index,
            lowering,
        )
        self.operand_kinds: tuple[bool, ...] = ()  # whether each operand is a tensor
        self.single = type(metas) is TensorMeta
        self.dynamic = lowering is not None and lowering.kind == "dynamic"
        self.checks: list[Check] = []  # filled when the program is traced
        stateful = lowering is not None and (
            lowering.random or lowering.writes or lowering.checks or lowering.kind == "stateful"
        )
        self.plain = program is not None and not stateful


class FunctionalRule:
    """Values in, values out: one cached program per signature."""

    def __init__(self, func: Any, lowered: bool = True):
        self.func = func
        self.entries = REGISTRY.lowerings(func) if lowered else []
        self.element = None if self.entries else foreach_element(func)
        self.signature = Signature(
            func,
            self.entries or (REGISTRY.lowerings(self.element) if self.element else ()),
            bool(self.entries or self.element),
        )
        self.cache: dict[tuple[Any, ...], Entry] = {}
        self.rehearsed = bool(self.entries) and _is_public(func) and not any(e.random for e in self.entries)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Key and operands of a call."""
        if not kwargs and len(args) == 2 and type(args[0]) is Tensor and type(args[1]) is Tensor:
            return (args[0]._m, args[1]._m), args  # what the signature would give, at half the price
        return self.signature.bind(args, kwargs)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, operands = self.bind(args, kwargs)
        entry = self.cache.get(key)
        if entry is None:
            entry = self.cache[key] = self.resolve(args, kwargs)
        return self.run(entry, operands, args, kwargs)

    def run(self, entry: Entry, operands: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call whose signature has been resolved."""
        if not entry.plain:
            return self._special(entry, operands, args, kwargs)
        executor = state.executor
        try:
            out = executor.run(entry.program, operands)
        except ImpureTrace:
            return self._impure(entry, args, kwargs)
        except errors.LoweringError as error:
            raise torchs_error(self.func, args, kwargs, error) from error
        if not entry.single:
            return wrap_nest(out, entry.metas)
        if executor.owner is not None:
            return wrap(out, entry.metas)
        meta = entry.metas
        return make(Storage(out, meta), meta)

    def raw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Raw results and their metadata, for the forms that write them somewhere."""
        key, operands = self.bind(args, kwargs)
        entry = self.cache.get(key)
        if entry is None:
            entry = self.cache[key] = self.resolve(args, kwargs)
        if not entry.plain:
            return unwrapped(self._special(entry, operands, args, kwargs))
        try:
            return state.executor.run(entry.program, operands), entry.metas
        except ImpureTrace:
            return unwrapped(self._impure(entry, args, kwargs))
        except errors.LoweringError as error:
            raise torchs_error(self.func, args, kwargs, error) from error

    # ------------------------------------------------------------------ the first call of a signature
    def resolve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """Who serves calls like this one, and what they give."""
        func = self.func
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type not in (
            "jax",
            "lazy",
        ):  # ones_like(x, device="cpu")
            return Entry(
                None, lambda a, k: func(*tree_map(lambda x: _stand_in(x, k["device"]), a), **k), None, (), 0, None
            )
        index = device_index(func, args, kwargs)
        entry = self._choose(args, kwargs, index)
        if entry is None and self.entries:  # no condition holds: torch's decomposition, which takes numbers as numbers
            return Entry(None, FunctionalRule(func, lowered=False), None, (), index, None)
        if entry is not None and entry.kind == "composite":
            return Entry(None, lambda a, k: entry.fn(*a, **k), None, (), index, None)
        template = self.signature.template(args, kwargs, everything=entry is None and self.element is None)
        if entry is None and self.element is None and is_composite_implicit(func):
            return Entry(None, lambda a, k: func.decompose(*a, **k), None, template, index, None)
        if entry is not None and entry.kind == "dynamic":
            return Entry(None, lowered(func, entry, args, kwargs, None), None, template, index, entry)
        try:
            mend = True if entry is None else entry.meta
            metas = infer(func, args, kwargs, index, mend=mend) if mend else None
        except NoMeta:
            metas = None
        if entry is not None and entry.memory_format_of and metas is not None:
            metas = in_memory_format_of(entry.memory_format_of, func, args, kwargs, metas)
        if self.rehearsed and (error := refused(func, args, kwargs)) is not None:
            raise error
        results = metas
        if entry is not None and (entry.kind == "stateful" or entry.writes):
            results = self._with_writes(metas, entry, args, kwargs)
        apply = self._apply(entry, args, kwargs, results, index)
        if apply is None:
            return Entry(None, lambda a, k: missing(func, a, k), None, template, index, None)
        operands = self.signature.bind(args, kwargs)[1]
        random_op = entry is not None and entry.random

        def run(*arrays: Any) -> Any:
            if random_op:
                key, after = random.draw(arrays[0])
                a, k = place(template, arrays[1:])
                out = apply(a, {**k, "key": key})
                return out, after
            a, k = place(template, arrays)
            return apply(a, k)

        if results is None and entry is None and self.element is None:  # its decomposition reads values: op by op
            way = decomposition(func)
            return Entry(None, lambda a, k: op_by_op(func, way[1], a, k), None, template, index, None)  # type: ignore[index]
        if results is None:
            try:
                metas = infer_by_shape(without_state(run) if random_op else run, operands, index)
            except Exception as error:
                raise torchs_error(func, args, kwargs, error) from error
        if entry is not None and entry.column_major:
            metas = column_major(metas, entry.column_major)
        wide = any(type(o) is not Tensor or o._m.wide for o in operands) or any(
            type(m) is TensorMeta and m.wide for m in tree_flatten(metas)[0]
        )
        checks: list[Check] = []
        program = (
            Program(run, func.name(), True, index, checked(run, checks))
            if entry is not None and entry.checks
            else Program(run, func.name(), wide or random_op, index)
        )
        resolved = Entry(program, apply, metas, template, index, entry)
        resolved.checks = checks
        resolved.operand_kinds = tuple(type(o) is Tensor for o in operands)
        return resolved

    def resolve_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """As `resolve`, for the kernel that keeps a composite op whole: torch's parts where no lowering's condition holds."""
        if self._choose(args, kwargs, device_index(self.func, args, kwargs)) is None:
            parts = torch._C.DispatchKey.CompositeImplicitAutograd
            return Entry(None, lambda a, k: self.func._op_dk(parts, *a, **k), None, (), 0, None)
        return self.resolve(args, kwargs)

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Lowering | None:
        if not self.entries:
            return None
        first = next((x for x in tree_flatten((args, kwargs))[0] if type(x) is Tensor), None)
        call = as_shapes(args, kwargs)
        return REGISTRY.resolve(
            self.func, convert.platform(index), first.dtype if first is not None else kwargs.get("dtype"), call
        )

    def _apply(
        self, entry: Lowering | None, args: tuple[Any, ...], kwargs: dict[str, Any], metas: Any, index: int
    ) -> Apply | None:
        func = self.func
        if entry is not None:
            return lowered(func, entry, args, kwargs, metas)
        if self.element is not None:
            return foreach_apply(func, self.element, args, kwargs, RULES)
        way = decomposition(func)
        return None if way is None else decomposed(func, way[1], metas, index)

    def _with_writes(self, metas: Any, entry: Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if metas is None:
            return None
        targets = _written(self.func, entry, args, kwargs)
        if not targets:
            return metas
        results = metas if isinstance(metas, tuple | list) else (metas,)
        return (*results[: fresh_returns(self.func)], *(t._m if t is not None else None for t in targets))

    # ------------------------------------------------------------------ calls that are more than a program
    def _special(self, entry: Entry, operands: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if entry.dynamic:
            try:
                return self._dynamic(entry, operands)
            except errors.TorchaxError:
                raise
            except Exception as error:
                raise torchs_error(self.func, args, kwargs, error) from error
        if entry.program is None:
            return entry.apply(args, kwargs)
        try:
            return self._stateful(entry, operands, args, kwargs)
        except errors.LoweringError as error:
            raise torchs_error(self.func, args, kwargs, error) from error

    def _stateful(self, entry: Entry, operands: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        executor, lowering = state.executor, entry.lowering
        assert lowering is not None
        generator = None
        if lowering.random:
            generator = random.source(kwargs.get("generator"), entry.index)
            operands = (generator.load(), *operands)
        out = executor.run(entry.program, operands)
        if lowering.checks and executor.owner is None:
            out, flags = out
            if flags:
                wait_for(self.func.name(), entry.checks, flags)
                if config.eager == "debug":
                    settle()
        if generator is not None:
            out, after = out
            generator.store(after)
        targets = _written(self.func, lowering, args, kwargs)
        if not targets:
            return wrap_nest(out, entry.metas)
        values = list(out) if isinstance(out, tuple | list) else [out]
        fresh = len(values) - len(targets)
        for target, value in zip(targets, values[fresh:], strict=True):
            if target is not None:
                executor.write(target, value)
        metas = entry.metas if isinstance(entry.metas, tuple | list) else (entry.metas,)
        results = [wrap(v, m) for v, m in zip(values[:fresh], metas, strict=False)]
        if not fresh:
            return targets[0] if len(targets) == 1 else None
        return results[0] if len(results) == 1 else tuple(results)

    def _dynamic(self, entry: Entry, operands: list[Any]) -> Any:
        executor = state.executor
        arrays = [executor.read(o) if type(o) is Tensor else o for o in operands]
        traced = any(isinstance(a, jax.core.Tracer) for a in arrays)
        if traced and not self.func._schema.returns:  # a check of values
            return None
        if traced:
            raise errors.DataDependentShape(
                f"{self.func}: the shape of its result depends on values, which are not known while a function is traced. "
                "Use a form of fixed size (torch.where, masked sums, nonzero_static), or call it outside of the compiled function"
            )
        settle()
        a, k = place(entry.template, arrays)
        with jax.enable_x64(True):
            out = entry.apply(a, k)
        if not self.func._schema.returns:
            return None

        def result(x: Any) -> Tensor:
            value = x if isinstance(x, jax.Array) else convert.on_device(np.asarray(x), entry.index)
            shape, dtype = tuple(value.shape), dtypes.to_torch(value.dtype)
            strides = numpy_strides(x) if isinstance(x, np.ndarray) else None
            return wrap(
                value,
                dense_meta(shape, dtype, entry.index)
                if strides is None
                else meta_of(shape, strides, dtype, entry.index),
            )

        return tree_map(result, out)

    def _impure(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        way = decomposition(self.func)
        assert way is not None
        decompose, func = way[1], self.func
        entry.program, entry.lowering, entry.metas, entry.plain = None, None, None, False
        entry.apply = lambda a, k: op_by_op(func, decompose, a, k)
        return entry.apply(args, kwargs)


def without_state(run: Callable[..., Any]) -> Callable[..., Any]:
    """A random op's program from its operands to its results, for their shapes."""
    return lambda *arrays: run(jax.numpy.zeros(3, np.uint32), *arrays)[0]


def _stand_in(x: Any, device: Any) -> Any:
    return torch.empty_strided(x._m.shape, x._m.strides, dtype=x.dtype, device=device) if type(x) is Tensor else x


def as_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call as predicates see it: shapes in place of tensors."""
    return tree_map(_as_shape, args), tree_map(_as_shape, {k: v for k, v in kwargs.items() if k not in DROPPED})


def _as_shape(x: Any) -> Any:
    if type(x) is Tensor:
        return jax.ShapeDtypeStruct(x._m.shape, x._m.jax_dtype)
    if isinstance(x, torch.Tensor):
        return jax.ShapeDtypeStruct(tuple(x.shape), dtypes.to_jax(x.dtype))
    return x.node.hint if type(x) is SYMBOL else x


def fresh_returns(func: Any) -> int:
    return sum(r.alias_info is None for r in func._schema.returns)


def _written(func: Any, entry: Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that the op writes, by the schema or by the lowering's word."""
    targets = []
    for i, a in enumerate(func._schema.arguments):
        if a.name in entry.writes or (a.alias_info is not None and a.alias_info.is_write):
            targets.append(kwargs.get(a.name) if a.kwarg_only or i >= len(args) else args[i])
    return targets


def torchs_error(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> Exception:
    """What torch says to a call that a lowering could not serve and torch's meta kernel let pass; else `error`."""
    said = cpu_error(func, args, kwargs)
    no_kernel = isinstance(said, NotImplementedError) and "not implemented for" not in str(
        said
    )  # else: not for this dtype
    return error if said is None or no_kernel else said


def unwrapped(out: Any) -> tuple[Any, Any]:
    return tree_map(lambda t: state.executor.read(t) if type(t) is Tensor else t, out), tree_map(
        lambda t: t._m if type(t) is Tensor else t, out
    )


def _is_public(func: Any) -> bool:
    """Whether users call the op, rather than torch's own code with arguments that are right."""
    name = func._schema.name.removeprefix("aten::")
    return (name[0] != "_" or name in ("_softmax", "_log_softmax")) and "backward" not in name


class ProductRule(FunctionalRule):
    """As `FunctionalRule`, for products of matrices: one program for each setting of their precision."""

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        key, operands = super().bind(args, kwargs)
        return (setting(), *key), operands


def wrap_nest(out: Any, metas: Any) -> Any:
    """Raw results as tensors, in the nest that torch gives; what is no tensor comes from the metadata."""
    if type(metas) is TensorMeta:
        return wrap(out, metas)
    if isinstance(metas, list | tuple):
        return type(metas)(
            [None if m is None or o is None else wrap_nest(o, m) for o, m in zip(out, metas, strict=True)]
        )
    return metas
