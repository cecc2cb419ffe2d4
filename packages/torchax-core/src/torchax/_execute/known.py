"""What is known while a function is traced: values that depend on nothing but shapes and numbers, as positions of tokens do.

Python may ask for them, so that code such as ``if (positions.diff() == 1).all()`` goes the way in a compiled function
that it goes outside of it. The program stays as it is: the value is computed on the side, and only when it is asked for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import numpy as np
from jax.extend.core import Literal

_LARGEST = 1 << 20  # elements of any value on the way
_MOST = 128  # operations


def known_value(x: Any) -> jax.Array | None:
    """The value of a traced array of integers or bools that follows from no argument and no tensor; None if there is none.

    Values of tensors from outside count as unknown, since they are inputs of the program, whose later calls may bring
    others. Floats do, too: what decides which way Python goes is counted, and larger values are best computed in the program.
    """
    if np.dtype(x.dtype).kind not in "iub" or not hasattr(x, "parent"):
        return None
    steps = _steps(x)
    if steps is None:
        return None

    def compute() -> Any:
        values: dict[int, Any] = {}
        for step in steps:
            given = [_constant(t) if t.parent is None else values[id(t.val)] for t in step.in_tracers]
            with step.ctx.manager:
                out = step.primitive.bind(*given, **step.primitive.get_bind_params(step.params))
            values.update(zip(map(id, step.outvars), out if step.primitive.multiple_results else [out], strict=True))
        return values[id(x.val)]

    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return jax.jit(compute)()


def _steps(x: Any) -> list[Any] | None:
    """The operations that lead to a tracer, in order; None where one of them is of something unknown, or they are too many."""
    found: dict[int, Any] = {}
    waiting = [(x, False)]
    while waiting:
        tracer, ready = waiting.pop()
        step = getattr(tracer, "parent", None)
        if step is None:
            if _constant(tracer) is None:
                return None
            continue
        if id(step) in found:
            continue
        if ready:
            found[id(step)] = step
        elif len(found) + len(waiting) > _MOST or step.effects or any(v.aval.size > _LARGEST for v in step.outvars):
            return None
        else:
            waiting.append((tracer, True))
            waiting += [(t, False) for t in step.in_tracers]
    return list(found.values()) if found else None


def _constant(tracer: Any) -> Any:
    """A number or array of numbers compiled in; None for inputs and for tensors from outside, whose constants are `jax.Array`s."""
    literal = isinstance(tracer.val, Literal)
    value = tracer.val.val if literal else tracer._trace.frame.constvar_to_val.get(tracer.val)
    return None if value is None or isinstance(value, jax.Array) else np.asarray(value)
