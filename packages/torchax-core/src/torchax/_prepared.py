"""Rules of factories that say themselves which of their numbers decide the program (``arange``)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import _core_ops
from ._execute import Program, state
from ._infer import infer, infer_by_shape
from ._registry import Lowering
from ._signature import DROPPED
from .tensor import wrap


def prepared_rule(func: Any, entry: Lowering) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """The rule of an op without tensor arguments whose lowering has a ``prepare``."""
    cache: dict[Any, Any] = {}
    prepare = entry.prepare
    assert prepare is not None

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = _core_ops.current_index(kwargs.get("device"))
        prepared = prepare(*args, **{k: v for k, v in kwargs.items() if k not in DROPPED})
        if prepared is None:
            infer(func, args, kwargs, index)
            raise RuntimeError(f"{func} refused {args}")
        static, operands = prepared
        key = (static, index, *map(type, operands))
        hit = cache.get(key)
        if hit is None:
            run = functools.partial(entry.fn, *static)
            hit = cache[key] = (Program(run, func.name(), True, index), infer_by_shape(run, list(operands), index))
        program, meta = hit
        return wrap(state.executor.run(program, operands), meta)

    return rule
