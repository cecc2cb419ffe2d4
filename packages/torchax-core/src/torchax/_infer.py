"""Output metadata, and torch's own errors, from the op itself: run on ``meta`` tensors, once per signature."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from . import dtypes
from ._execute.traced import SYMBOL
from ._storage import TensorMeta, dense_meta, extent, meta_of
from .tensor import Tensor

_CPU_COPY_LIMIT = 1 << 16  # elements; a written operand larger than this is not allocated just to word an error
_NO_META = ("cannot be called on meta tensors", "fake impl")  # torch raises plain RuntimeErrors for these


def _unseen(function: Any) -> Any:
    """`function` without the user's dispatch modes: a mode that logs or counts ops must not see stand-ins run."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._len_torch_dispatch_stack():
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


class NoMeta(Exception):
    """torch cannot tell the op's metadata without running it."""


@_unseen
def infer(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, fresh: bool = False, mend: Any = None
) -> Any:
    """What `func` gives on tensors of this metadata: the same nest, with a `TensorMeta` on device `index` for each tensor.

    `mend` is as the attribute ``meta`` of a lowering. Other arguments and errors as for `run_on_meta`.
    """
    out = run_on_meta(func, args, kwargs, fresh)
    if callable(mend):
        out = mend(out, *args, **kwargs)
    return tree_map(lambda m: describe(m, index) if isinstance(m, torch.Tensor) else m, out)


def describe(m: torch.Tensor, index: int) -> TensorMeta:
    """The metadata of a meta tensor, on device `index`."""
    return meta_of(tuple(m.shape), tuple(m.stride()), m.dtype, index)


@_unseen
def in_memory_format_of(
    names: tuple[str, ...], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metas: Any
) -> Any:
    """`metas` in the memory format of the arguments `names`: channels last if one of them suggests it."""
    named = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.name in names and type(a) is Tensor]
    suggested = {suggest_memory_format(a._m.on_meta()): len(a._m.shape) for a in named}
    suggested.pop(torch.contiguous_format, None)
    for memory_format, rank in suggested.items():
        metas = tree_map(functools.partial(_formatted, memory_format, rank), metas)
    return metas


def _formatted(memory_format: torch.memory_format, rank: int, m: Any) -> Any:
    if type(m) is not TensorMeta or len(m.shape) != rank:
        return m
    strides = torch.empty(m.shape, device="meta", memory_format=memory_format).stride()
    return meta_of(m.shape, tuple(strides), m.dtype, m.index)


def column_major(metas: Any, which: tuple[int, ...]) -> Any:
    """`metas` with the matrices of the results `which` laid out by columns, as LAPACK leaves them."""

    def turned(m: TensorMeta) -> TensorMeta:
        flipped = dense_meta((*m.shape[:-2], *m.shape[:-3:-1]), m.dtype, m.index).strides
        return meta_of(m.shape, (*flipped[:-2], *flipped[:-3:-1]), m.dtype, m.index)

    if type(metas) is TensorMeta:
        return turned(metas)
    return tuple([turned(m) if i in which else m for i, m in enumerate(metas)])


@_unseen
def run_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fresh: bool = False) -> Any:
    """What `func` gives on meta tensors of this metadata.

    Args:
        func: the op.
        args: its positional arguments.
        kwargs: its keyword arguments.
        fresh: the op changes its operands, so they must not be the cached ones.

    Raises:
        NoMeta: the op has no meta kernel, or its shape depends on values.
        Exception: what CPU torch raises for these arguments.
    """
    sizes_on_host = any(
        a.name == "batch_sizes" for a in func._schema.arguments
    )  # of packed sequences: their values are read

    def on_meta(x: Any) -> Any:
        if type(x) is Tensor:
            return x._m.fresh_on_meta() if fresh else x._m.on_meta()
        if isinstance(x, torch.Tensor):
            return x if x.dim() == 0 or sizes_on_host else x.to("meta")
        if isinstance(x, torch.device):
            return torch.device("meta")
        if type(x) is SYMBOL:  # of metadata, values decide nothing
            return x.node.hint
        return None if isinstance(x, torch.Generator) else x

    margs, mkwargs = tree_map(on_meta, args), tree_map(on_meta, kwargs)
    try:
        with torch.no_grad():
            return func(*margs, **mkwargs)
    except (NotImplementedError, DynamicOutputShapeException) as error:
        raise NoMeta(str(error)) from None
    except Exception as error:
        if any(text in str(error) for text in _NO_META):
            raise NoMeta(str(error)) from None
        raise (cpu_error(func, args, kwargs) or error) from None


def on_cpu(nest: Any, stand_in: Callable[[Tensor], torch.Tensor]) -> Any:
    """Arguments of a call as CPU torch takes them: a CPU tensor for each tensor, the CPU for devices, no generator."""

    def one(x: Any) -> Any:
        if type(x) is Tensor:
            return stand_in(x)
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if type(x) is SYMBOL:
            return x.node.hint
        return None if isinstance(x, torch.Generator) else x

    return tree_map(one, nest)


@_unseen
def cpu_error(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """What CPU torch says: the op on CPU tensors of the same metadata; large ones hold one expanded element."""
    written = {
        id(a)
        for a, s in zip(args, func._schema.arguments, strict=False)
        if s.alias_info is not None and s.alias_info.is_write
    }
    pivots = pivots_of(func, args)

    def stand_in(x: Tensor) -> torch.Tensor:
        if id(x) in written:
            if math.prod(x._m.shape) > _CPU_COPY_LIMIT:
                raise MemoryError
            return torch.zeros(x._m.shape, dtype=x._m.dtype)
        weights = x._m.dtype.is_floating_point or id(x) in pivots
        filled = torch.ones if weights else torch.zeros  # weights that sum up, indices in range
        size = extent(x._m.shape, x._m.strides)
        if size <= _CPU_COPY_LIMIT:  # with its strides, by which some ops judge
            return filled(size, dtype=x._m.dtype).as_strided(x._m.shape, x._m.strides)
        return filled((), dtype=x._m.dtype).expand(x._m.shape)

    try:
        with torch.no_grad():
            func(*on_cpu(args, stand_in), **on_cpu(kwargs, stand_in))
    except MemoryError:
        return None
    except Exception as error:
        return error
    return None


def pivots_of(func: Any, args: tuple[Any, ...]) -> set[int]:
    """Which arguments (by `id`) are pivots of LAPACK: counted from one, and not checked by what reads them."""
    return {id(a) for a, s in zip(args, func._schema.arguments, strict=False) if "pivots" in s.name}


def infer_by_shape(run: Callable[..., Any], operands: list[Any], index: int) -> Any:
    """For ops without a meta kernel: shapes and dtypes of what `run` gives for the operands, row-major strides."""

    def shape(o: Any) -> Any:
        if type(o) is Tensor:
            return jax.ShapeDtypeStruct(o._m.shape, o._m.jax_dtype)
        return o.node.hint if type(o) is SYMBOL else o

    with jax.enable_x64(True):
        out = jax.eval_shape(run, *map(shape, operands))
    return jax.tree.map(lambda s: dense_meta(tuple(s.shape), dtypes.to_torch(s.dtype), index), out)
