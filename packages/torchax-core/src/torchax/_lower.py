"""From a lowering (or a decomposition) to a function over arrays: promotion before it, checks and casts after it."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as KIND
from torch._prims_common import elementwise_dtypes
from torch.utils._pytree import tree_flatten, tree_map

from . import convert, dtypes, errors
from ._execute import executing, state
from ._execute.traced import SYMBOL, ImpureTrace, Traced
from ._gradient import with_gradient
from ._missing import missing, not_found
from ._precision import products
from ._registry import Lowering
from ._storage import TensorMeta
from .config import config
from .tensor import Tensor

_KINDS = {
    "default": KIND.DEFAULT,
    "keep": KIND.NO_OPMATH,
    "int_to_float": KIND.INT_TO_FLOAT,
    "always_bool": KIND.ALWAYS_BOOL,
    "complex_to_float": KIND.COMPLEX_TO_FLOAT,
    "bool_to_long": KIND.BOOL_TO_LONG,
}
_HALVES = (torch.float16, torch.bfloat16)
_nothing = contextlib.nullcontext()
Apply = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def lowered(func: Any, entry: Lowering, args: tuple[Any, ...], kwargs: dict[str, Any], metas: Any) -> Apply:
    """A function of (args, kwargs) with arrays in place of tensors, for calls of this signature.

    Args:
        func: the op.
        entry: its lowering.
        args: the call's arguments.
        kwargs: its keyword arguments.
        metas: metadata of the results as `_infer.infer` gives it, None where nobody knows.
    """
    fn = entry.fn
    if entry.layouts:
        named = zip(args, func._schema.arguments, strict=False)
        fn = functools.partial(
            fn, row_major=frozenset(s.name for a, s in named if type(a) is Tensor and a._m.contiguous)
        )
    if entry.grad is not None:
        fn = with_gradient(fn, entry.grad, func)
    promotion = _promotion(func, entry, args, kwargs)

    def apply(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if promotion is not None:
            args, kwargs = promotion(args, kwargs)
        with products() if entry.products else _nothing:
            out = fn(*args, **kwargs)
        return out if metas is None else conform(out, metas, func, entry.provider)

    return apply


def conform(out: Any, metas: Any, func: Any, provider: str) -> Any:
    """Raw results cast to the dtypes that torch says, their shapes checked."""
    if type(metas) is TensorMeta:
        return _conform(out, metas, func, provider)
    if metas is None or not isinstance(metas, list | tuple):
        return None if metas is None else out
    if not isinstance(out, list | tuple) or len(out) != len(metas):
        raise errors.LoweringError(
            f"the lowering of {func} by plugin {provider!r} gave {_said(out)} where torch gives {len(metas)} results"
        )
    # None: what `output_mask` leaves out
    return tuple(None if o is None else conform(o, m, func, provider) for o, m in zip(out, metas, strict=True))


def _conform(x: Any, meta: TensorMeta, func: Any, provider: str) -> Any:
    if not isinstance(x, jax.Array):
        x = jnp.asarray(x)
    if x.dtype != meta.jax_dtype:
        x = convert.cast(x, meta.jax_dtype)
    if tuple(x.shape) != meta.shape:
        raise errors.LoweringError(
            f"the lowering of {func} by plugin {provider!r} gave shape {list(x.shape)} where torch gives {list(meta.shape)}"
        )
    return x


def _said(out: Any) -> str:
    return f"{len(out)} results" if isinstance(out, list | tuple) else type(out).__name__


def _promotion(func: Any, entry: Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    if entry.promote is None:
        return None
    schema = func._schema.arguments
    names = [a.name for a in schema if not a.kwarg_only]
    kinds = {a.name: str(a.type) for a in schema}

    def takes_part(name: str) -> bool:
        if entry.promote_only:
            return name in entry.promote_only
        return "Tensor" in kinds[name] or "number" in kinds[name]

    positions = [i for i, name in enumerate(names[: len(args)]) if takes_part(name)]
    keywords = [name for name in kwargs if name in kinds and takes_part(name)]
    participants = [args[i] for i in positions] + [kwargs[name] for name in keywords]
    flat = [
        _on_meta(x)
        for x in tree_flatten(participants)[0]
        if x is not None and isinstance(x, torch.Tensor | bool | int | float | complex | SYMBOL)
    ]
    if not any(isinstance(x, torch.Tensor) for x in flat):
        return None
    compute, common = elementwise_dtypes(*flat, type_promotion_kind=_KINDS[entry.promote])
    if compute is torch.complex32:  # a comparison of float16 and complex: the only such op whose result JAX can hold
        return _promoter(positions, keywords, lambda x, _: _rounded_to_half(_promoted(x, np.dtype(np.complex64))))
    dtype = dtypes.to_jax(compute)
    if common in _HALVES:
        half = dtypes.to_jax(common)
        exact = [*(i for i in positions if names[i] in entry.exact), *(k for k in keywords if k in entry.exact)]

        def convert_half(x: Any, at: int | str) -> Any:
            if at in exact and np.ndim(x) == 0:
                return _promoted(x, np.dtype(np.float32))
            return _promoted(_through(x, half), dtype)

        return _promoter(positions, keywords, convert_half)
    return _promoter(positions, keywords, lambda x, _: _promoted(x, dtype))


def _promoter(
    positions: list[int], keywords: list[str], convert_one: Callable[[Any, int | str], Any]
) -> Callable[..., Any]:
    def promote(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = list(args)
        for i in positions:
            new[i] = convert_one(args[i], i)
        if keywords:
            kwargs = {k: convert_one(v, k) if k in keywords else v for k, v in kwargs.items()}
        return tuple(new), kwargs

    return promote


def _on_meta(x: Any) -> Any:
    return x._m.on_meta() if type(x) is Tensor else x.node.hint if type(x) is SYMBOL else x


def _promoted(x: Any, dtype: np.dtype) -> Any:
    if x is None or isinstance(x, str):
        return x
    if isinstance(x, list | tuple):
        return [_promoted(y, dtype) for y in x]
    if isinstance(x, bool | int | float | complex):  # compiled in: stays a Python number, of the kind of dtype
        if dtype.kind in "fV":
            return float(x.real)
        if dtype.kind == "c":
            return complex(x)
        fits = dtype.kind == "b" or np.iinfo(dtype).min <= x.real <= np.iinfo(dtype).max
        return x if fits else np.asarray(x).astype(dtype)
    if x.dtype == dtype:
        return x
    x = jnp.asarray(x)
    if x.dtype == np.bool_ and dtype.kind not in "bui":  # XLA makes a select of a product with a bool: False * inf is 0
        x = x.astype(np.uint8)
    return convert.cast(x, dtype)


def _through(x: Any, half: np.dtype) -> Any:
    """An operand with the values that it has in `half`, the common dtype of a computation in float32."""
    if isinstance(x, bool | int | float | complex):
        return float(np.asarray(x.real).astype(half))
    if not hasattr(x, "dtype") or x.dtype in (half, np.bool_):
        return x
    return convert.cast(jnp.asarray(x), half)


def _rounded_to_half(x: Any) -> Any:
    """The values that complex32 has for complex64 ones, as complex64."""
    x = jnp.asarray(x, np.complex64)
    parts = (p.astype(np.float16).astype(np.float32) for p in (jnp.real(x), jnp.imag(x)))
    return jax.lax.complex(*parts)


# ---------------------------------------------------------------------- decompositions
class _Active(threading.local):
    funcs: tuple[Any, ...] = ()


_active = _Active()


@contextlib.contextmanager
def _decomposing(func: Any) -> Iterator[None]:
    if func in _active.funcs:  # torch decomposes it into itself: nobody really does it
        raise not_found(func)
    _active.funcs = (*_active.funcs, func)
    try:
        yield
    finally:
        _active.funcs = _active.funcs[:-1]


def decomposition(func: Any) -> tuple[str, Callable[..., Any]] | None:
    """torch's own way to express `func` by other ops, with its kind: ``decomposition`` or ``composite``."""
    from torch._decomp import decomposition_table

    table = decomposition_table.get(func)
    if table is not None:
        return "decomposition", table
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeExplicitAutograd"):
        return "composite", lambda *args, **kwargs: func._op_dk(key, *args, **kwargs)
    return None


def is_composite_implicit(func: Any) -> bool:
    """Whether torch takes the op apart before any backend sees it."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def decomposed(func: Any, decompose: Callable[..., Any], metas: Any, index: int) -> Apply:
    """As `lowered`, for a decomposition: its ops are traced into one program.

    Raises (when applied):
        ImpureTrace: it needs more than its arguments (random numbers), or values: run it op by op.
    """

    def apply(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace = Traced(outer=state.executor, pure=True)
        with _decomposing(func), executing(trace), torch.no_grad():
            lift = lambda x: Tensor(x) if isinstance(x, jax.Array) else x
            try:
                out = decompose(*tree_map(lift, args), **tree_map(lift, kwargs))
            except (errors.TracerEscaped, errors.DataDependentShape):
                raise ImpureTrace from None
            except errors.OperatorNotFound:
                if config.fallback == "cpu":  # op by op, CPU torch can stand in where it must
                    raise ImpureTrace from None
                raise
            raw = tree_map(lambda t: _value(trace, t), out)
        return raw if metas is None else conform(raw, metas, func, "torch")

    return apply


def _value(trace: Traced, t: Any) -> Any:
    if type(t) is Tensor:
        return trace.read(t)
    return jnp.asarray(convert.to_array(t, 0)) if isinstance(t, torch.Tensor) else t


def op_by_op(func: Any, decompose: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The decomposition on tensors, each of its ops on its own."""
    if config.fallback == "cpu" and func in _active.funcs:
        return missing(func, args, kwargs)
    with _decomposing(func), torch.no_grad():
        return decompose(*args, **kwargs)


def composite_rule(func: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """An op that torch takes apart; it arrives whole in inference mode only. Its parts may be views, so each is run by itself."""
    if is_composite_implicit(func):
        return lambda args, kwargs: func.decompose(*args, **kwargs)
    way = decomposition(func)
    if way is None:
        return lambda args, kwargs: missing(func, args, kwargs)

    return lambda args, kwargs: op_by_op(func, way[1], args, kwargs)
