"""In-place and ``out=`` forms of every op, from its functional form and the schema's alias annotations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import _core_ops, convert, errors
from ._dispatch import RULES
from ._execute import state
from ._execute.traced import ImpureTrace
from ._functional import FunctionalRule, fresh_returns, unwrapped, wrap_nest
from ._infer import NoMeta, infer
from ._lower import composite_rule
from ._overlap import refusal, relations
from ._placing import device_index, mixed_devices
from ._registry import REGISTRY
from ._rehearsal import Outcome, rehearse
from ._signature import Signature
from ._storage import TensorMeta
from ._twins import functional_twin
from .tensor import Tensor


def mutating_rule(func: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """In-place and ``out=`` forms, from the functional op."""
    twin = functional_twin(func)
    if twin is None:
        return composite_rule(func)
    schema = func._schema
    written = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    outs = [a.name for _, a in written if a.is_out]
    if outs:  # what else is written (running statistics), the twin writes, too
        written = [(i, a) for i, a in written if a.is_out]
    has_dtype = bool(outs) and any(a.name == "dtype" for a in twin._schema.arguments)
    takes_dtype = has_dtype and not any("Tensor" in str(a.type) for a in twin._schema.arguments)
    product_dtype = _optional_out_dtype(twin) if outs else None
    sized_by_values = any(entry.kind == "dynamic" for entry in REGISTRY.lowerings(twin))
    checked: set[Any] = set()
    outcomes: dict[Any, Outcome | None] = {}
    signature = Signature(func, (), numbers=True)
    settled: dict[Any, Any] = {}  # key of the functional op -> its entry, where the result is what the target holds
    needed, defaults = _defaults_of(func, twin)
    bumps = schema.name.startswith("aten::_foreach_") and not outs  # torch leaves their versions to the device
    returned = [_alias_index(written, r) for r in schema.returns if r.alias_info is not None]
    order = _order_of(func, twin)
    simple = [i for i, _ in written] == [0] and not outs and len(schema.returns) == 1 and not bumps and order is None

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        functional = RULES[twin]
        if (
            not simple
            or not isinstance(functional, FunctionalRule)
            or len(args) < needed
            or type(args[0]) is not Tensor
        ):
            return checked_rule(args, kwargs)
        key, operands = functional.bind(args, kwargs)
        entry = settled.get(key)
        if entry is not None and entry.plain and not _shares(args[0], operands):
            executor = state.executor
            try:
                executor.write(args[0], executor.run(entry.program, operands))
            except (ImpureTrace, errors.LoweringError):  # nothing has been written
                return checked_rule(args, kwargs)
            return args[0]
        meta = args[0]._m
        result = checked_rule(args, kwargs)
        entry = functional.cache.get(key)
        if entry is not None and entry.plain and entry.metas is meta:
            settled[key] = entry
        return result

    def checked_rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) < needed:
            args = (*args, *defaults[len(args) - needed :])
        key, call = None, (args, kwargs)
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
                check_inplace(func, twin, args, kwargs, targets)
        if not bumps and (lying := relations(targets, args, kwargs, not outs)):
            _refuse_overlap(*call, lying)
        values, metas = _run_raw(twin, args if order is None else tuple([args[i] for i in order]), kwargs)
        if len(targets) == 1 and (type(metas) is TensorMeta or not schema.returns):
            values, metas = (values,), (metas,)
        if outs and any(isinstance(target, list | tuple) for target in targets):  # out= of split_copy is a list
            values, metas = _flat(values, targets), _flat(metas, targets)
            targets = _flat(targets, targets)
        fresh = 0 if outs else fresh_returns(func)
        if not all(map(_fits, targets, metas[fresh:])):
            rehearsed = _as_rehearsed(*call, targets, metas[fresh:])
            one = len(targets) == 1 and has_dtype and kwargs.get("dtype") is None
            if one and targets[0].dtype is not metas[0].dtype:
                # reductions compute in the dtype of out= (a sum of floats into integers is one of integers)
                value, meta = _run_raw(twin, args, {**kwargs, "dtype": targets[0].dtype})
                values, metas = (value,), (meta,)
            elif product_dtype is not None and targets[0].dtype is not metas[0].dtype:
                # products of 8-bit floats are rounded once, to the dtype of out=
                value, meta = _run_raw(twin, *_with(product_dtype, torch.float32, args, kwargs))
                values, metas = (value,), (meta,)
            for target, meta in zip(targets if outs and not rehearsed else (), metas, strict=False):
                prepare_out(target, meta, func)
        if key is not None:
            for target, meta in zip(targets, metas[fresh:], strict=False):
                check_cast(meta, target)
                check_shape(meta, target)
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

    def _refuse_overlap(args: tuple[Any, ...], kwargs: dict[str, Any], lying: tuple[tuple[int, str], ...]) -> None:
        key = (signature.bind(args, kwargs)[0], lying)
        if key not in checked:
            error = refusal(func, args, kwargs, lying)
            if error is not None:
                raise error
            checked.add(key)

    def _as_rehearsed(args: tuple[Any, ...], kwargs: dict[str, Any], targets: list[Any], metas: Any) -> bool:
        """Refuse or resize targets that do not fit the results as CPU torch does; whether that could be found out."""
        if not all(type(m) is TensorMeta for m in metas) or not all(type(t) is Tensor for t in targets):
            return False
        for t, m in zip(targets, metas, strict=True):
            if t._m.index != m.index:
                raise mixed_devices(f"jax:{m.index}", str(t.device), func)
        key = signature.bind(args, kwargs)[0]
        outcome = outcomes[key] if key in outcomes else rehearse(func, twin, args, kwargs, targets, metas)
        if outcome is None or outcome.error is None:
            outcomes[key] = outcome
        if outcome is None:
            return False
        if outcome.error is not None:
            raise outcome.error
        held = [math.prod(shape) for shape, _ in outcome.layouts]
        if sized_by_values or any(
            n < m.numel for n, m in zip(held, metas, strict=True)
        ):  # ihfftn of CPU torch loses results
            return False
        for target, meta, (shape, strides) in zip(targets, metas, outcome.layouts, strict=True):
            if target._m.shape != shape:
                if outcome.warned and target._m.numel:
                    warn_of_resize(target, meta)
                _core_ops.resize(target, shape, strides)
        return True

    return rule


def _flat(values: Any, targets: list[Any]) -> list[Any]:
    """Of the values at lists among the targets the elements, all others as they are."""
    pairs = zip(values, targets, strict=True)
    return [x for value, target in pairs for x in (value if isinstance(target, list | tuple) else (value,))]


def _fits(target: Any, meta: Any) -> bool:
    """Whether a result can be written as it is."""
    if type(meta) is not TensorMeta or target is None:
        return True
    if type(target) is not Tensor:
        return False
    m = target._m
    return m is meta or (m.shape == meta.shape and m.dtype is meta.dtype and m.index == meta.index)


def _defaults_of(func: Any, twin: Any) -> tuple[int, tuple[Any, ...]]:
    """What calls may leave out, but the twin wants (``bernoulli_(p=0.5)``): the number of arguments then, and the last ones."""
    wanted = {a.name for a in twin._schema.arguments if not a.has_default_value()}
    own = [a for a in func._schema.arguments if not a.kwarg_only]
    defaults = [(i + 1, a.default_value) for i, a in enumerate(own) if a.has_default_value() and a.name in wanted]
    return (defaults[-1][0], tuple(value for _, value in defaults)) if defaults else (0, ())


def _optional_out_dtype(twin: Any) -> int | None:
    """Where `twin` takes an ``out_dtype`` that may be None."""
    arguments = twin._schema.arguments
    return next((i for i, a in enumerate(arguments) if a.name == "out_dtype" and "Optional" in str(a.type)), None)


def _with(place: int, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments with ``out_dtype``, which is at `place`, where it was None."""
    if len(args) <= place:
        return args, {**kwargs, "out_dtype": dtype}
    return (*args[:place], dtype, *args[place + 1 :]), kwargs


def _order_of(func: Any, twin: Any) -> list[int] | None:
    """Where the twin's positional arguments are among those of `func` (``polygamma(n, self)``); None if at the same places."""
    own, wanted = ([a.name for a in f._schema.arguments if not a.kwarg_only] for f in (func, twin))
    return [own.index(name) for name in wanted] if own != wanted and sorted(own) == sorted(wanted) else None


def _alias_index(written: list[tuple[int, Any]], returned: Any) -> int:
    """Which of the written arguments a result is."""
    return next((i for i, (_, a) in enumerate(written) if a.alias_info.before_set == returned.alias_info.before_set), 0)


def _run_raw(twin: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    rule = RULES[twin]
    return rule.raw(args, kwargs) if isinstance(rule, FunctionalRule) else unwrapped(rule(args, kwargs))


def _write(target: Any, value: Any, meta: Any) -> None:
    if isinstance(target, list | tuple):
        for t, v, m in zip(target, value, meta, strict=True):
            _write(t, v, m)
    elif target is not None:
        tm = target._m
        if meta is not tm and (meta.shape != tm.shape or meta.dtype is not tm.dtype):
            value = convert.fit(value, meta, tm)
        state.executor.write(target, value)


def check_inplace(func: Any, twin: Any, args: tuple[Any, ...], kwargs: dict[str, Any], targets: list[Any]) -> None:
    """torch's own refusals of an in-place call: broadcasting, casts. Nothing has been changed yet."""
    index = device_index(func, args, kwargs)
    flat = [
        t for target in targets for t in (target if isinstance(target, list | tuple) else (target,)) if t is not None
    ]
    try:
        infer(func, args, kwargs, index, fresh=True)
    except NoMeta:
        return
    except Exception:
        outcome = rehearse(func, twin, args, kwargs, flat, ())
        if outcome is None or outcome.error is not None:  # else: CPU torch resizes it
            raise


def check_cast(meta: Any, target: Any) -> None:
    """torch's refusal of a result that the written tensor's dtype cannot hold (floats into integers)."""
    if isinstance(target, list | tuple):
        for m, t in zip(meta, target, strict=False):
            check_cast(m, t)
    elif type(meta) is TensorMeta and target is not None and not torch.can_cast(meta.dtype, target.dtype):
        raise RuntimeError(
            f"result type {_scalar_name(meta.dtype)} can't be cast to the desired output type {_scalar_name(target.dtype)}"
        )


def check_shape(meta: Any, target: Any) -> None:
    """torch's refusal of a result that is larger than the tensor to be written."""
    if type(meta) is not TensorMeta or type(target) is not Tensor or meta.shape == target._m.shape:
        return
    lead = len(target._m.shape) - len(meta.shape)
    if lead < 0 or any(n not in (1, m) for n, m in zip(meta.shape, target._m.shape[lead:], strict=True)):
        raise RuntimeError(
            f"output with shape {list(target._m.shape)} doesn't match the broadcast shape {list(meta.shape)}"
        )


def _shares(target: Any, operands: Any) -> bool:
    """Whether an operand beside the first one, the target, lies in the target's storage."""
    storage = target._s
    for o in operands[1:]:  # noqa: SIM110  (a generator would cost more than all the rest)
        if type(o) is Tensor and o._s is storage:
            return True
    return False


def prepare_out(out: Tensor, meta: Any, func: Any) -> None:
    """Resize ``out=`` to the result as torch does, after checking that the result can be cast to its dtype."""
    if not isinstance(meta, TensorMeta):
        return
    if type(out) is not Tensor or out._m.index != meta.index:
        raise mixed_devices(f"jax:{meta.index}", str(out.device), func)
    check_cast(meta, out)
    if out._m.shape != meta.shape:
        if out._m.numel:
            warn_of_resize(out, meta)
        _core_ops.resize(out, meta.shape, meta.strides)


def warn_of_resize(out: Tensor, meta: TensorMeta) -> None:
    """torch's warning."""
    warnings.warn(
        f"An output with one or more elements was resized since it had shape {list(out._m.shape)}, which does not match the "
        f"required output shape {list(meta.shape)}. This behavior is deprecated, and in a future PyTorch release outputs will "
        "not be resized unless they have zero elements. You can explicitly reuse an out tensor t by resizing it, inplace, to "
        "zero elements with t.resize_(0).",
        UserWarning,
        stacklevel=2,
    )


def _scalar_name(dtype: torch.dtype) -> str:
    return torch.empty(0, dtype=dtype, device="meta").type().split(".")[-1].removesuffix("Tensor")
