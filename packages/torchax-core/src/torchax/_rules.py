"""The kinds of rule: how an op is carried out on tensors, given who lowers it.

functional: values in, values out. mutating: in-place and ``out=`` forms, derived from the functional op through the
schema's alias annotations. view and in-place view: another `_views.Chain` on the same storage. decomposed, missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map

from . import _core_ops, convert, errors, random
from ._dispatch import RULES
from ._execute import Program, state
from ._execute.traced import ImpureTrace
from ._foreach import foreach_apply, foreach_element
from ._infer import NoMeta, cpu_error, infer, infer_by_shape
from ._lower import Apply, decomposed, decomposition, is_composite_implicit, lowered, op_by_op
from ._missing import missing
from ._prepared import prepared_rule
from ._registry import REGISTRY, Lowering
from ._signature import DROPPED, Signature, place
from ._storage import Storage, TensorMeta, dense_meta
from ._twins import functional_twin
from ._viewing import inplace_view_rule, strided_view_rule, view_rule, views_rule
from .tensor import Tensor, become, make, wrap

REGISTRY.listeners.append(RULES.clear)


def make_rule(func: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """The rule for an op; made once, when it is first called."""
    core = _core_ops.RULES.get(func.name())
    if core is not None:
        return core
    entries = REGISTRY.lowerings(func)
    kinds = {entry.kind for entry in entries}
    if "view" in kinds:
        return view_rule(func, entries[0])
    if "views" in kinds:
        return views_rule(func, entries[0])
    if entries and entries[0].prepare is not None:
        return prepared_rule(func, entries[0])
    if "stateful" in kinds and func._schema.is_mutable:
        return FunctionalRule(func)
    if torch.Tag.inplace_view in func.tags and func._schema.name.endswith("_"):
        return inplace_view_rule(func)
    if func._schema.is_mutable:
        return mutating_rule(func)
    if not entries and is_composite_implicit(func):
        return composite_rule(func)
    if not entries and not any("Tensor" in str(r.type) for r in func._schema.returns):  # it asks for values (allclose)
        return composite_rule(func)
    if not entries and _returns_alias(func):
        return strided_view_rule(func)
    rule = FunctionalRule(func)
    names = [a.name for a in func._schema.arguments if not a.kwarg_only]
    if "generator" in names:  # poisson(x, generator)
        at = names.index("generator")
        return lambda args, kwargs: rule(
            args[:at] + args[at + 1 :], {**kwargs, "generator": args[at]} if len(args) > at else kwargs
        )
    return rule


def _returns_alias(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns) and not func._schema.is_mutable


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
        stateful = lowering is not None and (lowering.random or lowering.writes or lowering.kind == "stateful")
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

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and len(args) == 2 and type(args[0]) is Tensor and type(args[1]) is Tensor:
            key, operands = (args[0]._m, args[1]._m), args  # what bind would give, at half the price
        else:
            key, operands = self.signature.bind(args, kwargs)
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
        key, operands = self.signature.bind(args, kwargs)
        entry = self.cache.get(key)
        if entry is None:
            entry = self.cache[key] = self.resolve(args, kwargs)
        if not entry.plain:
            return _unwrapped(self._special(entry, operands, args, kwargs))
        try:
            return state.executor.run(entry.program, operands), entry.metas
        except ImpureTrace:
            return _unwrapped(self._impure(entry, args, kwargs))
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
        index = _device_index(func, args, kwargs)
        entry = self._choose(args, kwargs, index)
        if entry is None and self.entries:  # no condition holds: torch's decomposition, which takes numbers as numbers
            return Entry(None, FunctionalRule(func, lowered=False), None, (), index, None)
        template = self.signature.template(args, kwargs, everything=entry is None and self.element is None)
        if entry is None and self.element is None and is_composite_implicit(func):
            return Entry(None, lambda a, k: func.decompose(*a, **k), None, template, index, None)
        if entry is not None and entry.kind == "dynamic":
            return Entry(None, lowered(func, entry, args, kwargs, None), None, template, index, entry)
        try:
            metas = infer(func, args, kwargs, index) if entry is None or entry.meta else None
        except NoMeta:
            metas = None
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
            metas = infer_by_shape(without_state(run) if random_op else run, operands, index)
        wide = any(type(o) is not Tensor or o._m.wide for o in operands) or any(
            type(m) is TensorMeta and m.wide for m in tree_flatten(metas)[0]
        )
        resolved = Entry(Program(run, func.name(), wide or random_op, index), apply, metas, template, index, entry)
        resolved.operand_kinds = tuple(type(o) is Tensor for o in operands)
        return resolved

    def resolve_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """As `resolve`, for the kernel that keeps a composite op whole: without a program where no lowering's condition holds."""
        if self._choose(args, kwargs, _device_index(self.func, args, kwargs)) is None:
            return Entry(None, lambda a, k: self.func.decompose(*a, **k), None, (), 0, None)
        return self.resolve(args, kwargs)

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Lowering | None:
        if not self.entries:
            return None
        first = next((x for x in tree_flatten((args, kwargs))[0] if type(x) is Tensor), None)
        call = (tree_map(_as_shape, args), tree_map(_as_shape, {k: v for k, v in kwargs.items() if k not in DROPPED}))
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
        plain = metas if isinstance(metas, tuple | list) else () if metas is None else (metas,)
        targets = _written(self.func, entry, args, kwargs)
        if not targets:
            return metas
        plain = (
            ()
            if self.func._schema.is_mutable and not _fresh_returns(self.func)
            else tuple(plain)[: _fresh_returns(self.func)]
        )
        return (*plain, *(t._m if t is not None else None for t in targets))

    # ------------------------------------------------------------------ calls that are more than a program
    def _special(self, entry: Entry, operands: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        executor = state.executor
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

    def _stateful(self, entry: Entry, operands: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        executor = state.executor
        if entry.lowering is not None and entry.lowering.random:
            generator = random.source(kwargs.get("generator"), entry.index)
            out, after = executor.run(entry.program, (generator.load(), *operands))
            generator.store(after)
        else:
            out = executor.run(entry.program, operands)
        if entry.lowering is None:
            return wrap_nest(out, entry.metas)
        targets = _written(self.func, entry.lowering, args, kwargs)
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
        a, k = place(entry.template, arrays)
        with jax.enable_x64(True):
            out = entry.apply(a, k)
        if not self.func._schema.returns:
            return None
        from . import dtypes

        def result(x: Any) -> Tensor:
            value = x if isinstance(x, jax.Array) else convert.on_device(np.asarray(x), entry.index)
            return wrap(value, dense_meta(tuple(value.shape), dtypes.to_torch(value.dtype), entry.index))

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


def _as_shape(x: Any) -> Any:
    if type(x) is Tensor:
        return jax.ShapeDtypeStruct(x._m.shape, x._m.jax_dtype)
    if isinstance(x, torch.Tensor):
        from . import dtypes

        return jax.ShapeDtypeStruct(tuple(x.shape), dtypes.to_jax(x.dtype))
    return x


def _fresh_returns(func: Any) -> int:
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
    return error if said is None or isinstance(said, NotImplementedError) else said


def _unwrapped(out: Any) -> tuple[Any, Any]:
    return tree_map(lambda t: state.executor.read(t) if type(t) is Tensor else t, out), tree_map(
        lambda t: t._m if type(t) is Tensor else t, out
    )


def wrap_nest(out: Any, metas: Any) -> Any:
    """Raw results as tensors, in the nest that torch gives; what is no tensor comes from the metadata."""
    if type(metas) is TensorMeta:
        return wrap(out, metas)
    if isinstance(metas, list | tuple):
        return type(metas)([None if m is None else wrap_nest(o, m) for o, m in zip(out, metas, strict=True)])
    return metas


def _device_index(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The device of a call; refuses mixed ones, in torch's words."""
    found, host = None, None
    for x in tree_flatten((args, kwargs))[0]:
        if type(x) is Tensor:
            if found is None:
                found = x._m.index
            elif found != x._m.index and x._m.shape:
                raise _mixed(f"jax:{found}", f"jax:{x._m.index}", func)
        elif isinstance(x, torch.Tensor) and x.dim() and not _takes_host(func, x):
            host = x.device
    if host is not None:
        raise _mixed(f"jax:{found or 0}", str(host), func)
    device = kwargs.get("device")
    return _core_ops.current_index(device) if found is None or device is not None else found


_INDEXING = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
    "aten::_unsafe_index_put",
}


def _takes_host(func: Any, x: torch.Tensor) -> bool:
    """Whether the op takes `x` on CPU beside tensors on the device: indices, and the batch sizes of packed sequences."""
    schema = func._schema
    return schema.name in _INDEXING or (
        x.dtype is torch.int64 and any(a.name == "batch_sizes" for a in schema.arguments)
    )


def _mixed(a: str, b: str, func: Any) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {a} and {b}! "
        f"(when calling {func}; move one of them with .to(...))"
    )


# ---------------------------------------------------------------------- in-place and out=
def mutating_rule(func: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """In-place and ``out=`` forms, from the functional op."""
    twin = functional_twin(func)
    if twin is None:
        return composite_rule(func)
    schema = func._schema
    written = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    outs = [a.name for _, a in written if a.is_out]
    takes_dtype = (
        bool(outs)
        and any(a.name == "dtype" for a in twin._schema.arguments)
        and not any("Tensor" in str(a.type) for a in twin._schema.arguments)
    )
    checked: set[Any] = set()
    signature = Signature(func, (), numbers=True)
    needed, defaults = _defaults_of(func, twin)
    bumps = schema.name.startswith("aten::_foreach_") and not outs  # torch leaves their versions to the device
    returned = [_alias_index(written, r) for r in schema.returns if r.alias_info is not None]

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) < needed:
            args = (*args, *defaults[len(args) - needed :])
        key = None
        if outs:
            kwargs = dict(kwargs)
            targets: list[Any] = [kwargs.pop(name) for name in outs]
            if takes_dtype:
                kwargs = {**kwargs, "dtype": targets[0].dtype, "device": targets[0].device}
        else:
            targets = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in written]
            key = signature.bind(args, kwargs)[0]
            if key in checked:
                key = None
            else:
                check_inplace(func, args, kwargs, targets)
        values, metas = _run_raw(twin, args, kwargs)
        if len(targets) == 1 and (type(metas) is TensorMeta or not schema.returns):
            values, metas = (values,), (metas,)
        fresh = 0 if outs else _fresh_returns(func)
        if outs:
            for target, meta in zip(targets, metas, strict=False):
                prepare_out(target, meta, func)
        if key is not None:
            for target, meta in zip(targets, metas[fresh:], strict=False):
                check_cast(meta, target)
            checked.add(key)
        for target, value, meta in zip(targets, values[fresh:], metas[fresh:], strict=False):
            _write(target, value, meta)
        if bumps:
            torch.autograd.graph.increment_version([t for listed in targets for t in listed if not t.is_inference()])
        if fresh:
            results = [wrap_nest(v, m) for v, m in zip(values[:fresh], metas[:fresh], strict=True)]
            return results[0] if len(results) == 1 and len(schema.returns) == 1 else tuple(results)
        if not schema.returns:
            return None
        return targets[returned[0]] if len(returned) == 1 else tuple([targets[i] for i in returned])

    return rule


def _defaults_of(func: Any, twin: Any) -> tuple[int, tuple[Any, ...]]:
    """What calls may leave out, but the twin wants (``bernoulli_(p=0.5)``): the number of arguments then, and the last ones."""
    wanted = {a.name for a in twin._schema.arguments if not a.has_default_value()}
    own = [a for a in func._schema.arguments if not a.kwarg_only]
    defaults = [(i + 1, a.default_value) for i, a in enumerate(own) if a.has_default_value() and a.name in wanted]
    return (defaults[-1][0], tuple(value for _, value in defaults)) if defaults else (0, ())


def _alias_index(written: list[tuple[int, Any]], returned: Any) -> int:
    """Which of the written arguments a result is."""
    return next((i for i, (_, a) in enumerate(written) if a.alias_info.before_set == returned.alias_info.before_set), 0)


def _run_raw(twin: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    rule = RULES[twin]
    return rule.raw(args, kwargs) if type(rule) is FunctionalRule else _unwrapped(rule(args, kwargs))


def _write(target: Any, value: Any, meta: Any) -> None:
    if isinstance(target, list | tuple):
        for t, v, m in zip(target, value, meta, strict=True):
            _write(t, v, m)
    elif target is not None:
        tm = target._m
        if meta is not tm and (meta.shape != tm.shape or meta.dtype is not tm.dtype):
            value = convert.fit(value, meta, tm)
        state.executor.write(target, value)


def check_inplace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], targets: list[Any]) -> None:
    """torch's own refusals of an in-place call: broadcasting, casts, overlapping memory. Nothing has been changed yet."""
    index = _device_index(func, args, kwargs)
    flat = [
        t for target in targets for t in (target if isinstance(target, list | tuple) else (target,)) if t is not None
    ]
    for t in flat:
        if any(stride == 0 and size > 1 for size, stride in zip(t._m.shape, t._m.strides, strict=True)) and not _fills(
            func
        ):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
                "Please clone() the tensor before performing the operation."
            )
    try:
        infer(func, args, kwargs, index, fresh=True)
    except NoMeta:
        return


def check_cast(meta: Any, target: Any) -> None:
    """torch's refusal of a result that the written tensor's dtype cannot hold (floats into integers)."""
    if isinstance(target, list | tuple):
        for m, t in zip(meta, target, strict=False):
            check_cast(m, t)
    elif type(meta) is TensorMeta and target is not None and not torch.can_cast(meta.dtype, target.dtype):
        raise RuntimeError(
            f"result type {_scalar_name(meta.dtype)} can't be cast to the desired output type {_scalar_name(target.dtype)}"
        )


def _fills(func: Any) -> bool:
    return func._schema.name in ("aten::fill_", "aten::zero_")


def prepare_out(out: Tensor, meta: Any, func: Any) -> None:
    """Resize ``out=`` to the result as torch does, after checking that the result can be cast to its dtype."""
    if not isinstance(meta, TensorMeta):
        return
    if type(out) is not Tensor or out._m.index != meta.index:
        raise _mixed(f"jax:{meta.index}", str(out.device), func)
    check_cast(meta, out)
    if out._m.shape != meta.shape:
        if out._m.numel:
            warnings.warn(
                f"An output with one or more elements was resized since it had shape {list(out._m.shape)}, which does not match the "
                f"required output shape {list(meta.shape)}. This behavior is deprecated, and in a future PyTorch release outputs will "
                "not be resized unless they have zero elements. You can explicitly reuse an out tensor t by resizing it, inplace, to "
                "zero elements with t.resize_(0).",
                UserWarning,
                stacklevel=2,
            )
        _core_ops.resize(out, meta.shape, meta.strides)


def _scalar_name(dtype: torch.dtype) -> str:
    return torch.empty(0, dtype=dtype, device="meta").type().split(".")[-1].removesuffix("Tensor")


# ---------------------------------------------------------------------- composite, missing
def composite_rule(func: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """An op that torch takes apart; it arrives whole in inference mode only. Its parts may be views, so each is run by itself."""
    if is_composite_implicit(func):
        return lambda args, kwargs: func.decompose(*args, **kwargs)
    way = decomposition(func)
    if way is None:
        return lambda args, kwargs: missing(func, args, kwargs)

    return lambda args, kwargs: op_by_op(func, way[1], args, kwargs)


__all__ = ["Entry", "FunctionalRule", "become", "make_rule"]
