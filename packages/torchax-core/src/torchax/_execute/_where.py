"""Turns what JAX raises inside an op into an error that names the op and the user's own line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import torch

from .. import errors

_INTERNAL = (
    *(os.path.dirname(os.path.abspath(f)) + os.sep for f in (errors.__file__, torch.__file__, jax.__file__)),
    "<",
)
_OURS = tuple(f"torchax_{name}" + os.sep for name in ("ops_aten", "ops_pallas", "interop"))


def user_line() -> str:
    """`` (called at FILE:LINE, in NAME)`` for the innermost frame outside of torch, JAX and torchax, or nothing."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_INTERNAL) and not any(part in name for part in _OURS):
            return f" (called at {name}:{frame.f_lineno}, in {frame.f_code.co_name})"
        frame = frame.f_back
    return ""


def failure(error: Exception, name: str, operands: Sequence[Any]) -> Exception:
    """The exception to raise for `error`, which came out of the op `name`."""
    if isinstance(error, (errors.TorchaxError, NotImplementedError)):
        return error
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return errors.TracerEscaped(
            f"{name} got a tensor that belongs to a function whose tracing has ended{user_line()}; return the tensor "
            "from the traced function instead of keeping it elsewhere"
        )
    if isinstance(error, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError):
        return errors.TracerEscaped(
            f"{name} needs values that are not known while a function is traced{user_line()}; use torch.where, "
            "or run this part outside of the traced function"
        )
    if gone := donated(operands):
        return errors.BufferDonated(f"{name}: {gone}{user_line()}")
    described = ", ".join(_describe(o) for o in operands)
    return errors.LoweringError(f"{name} failed on ({described}){user_line()}: {type(error).__name__}: {error}")


def donated(arrays: Sequence[Any]) -> str | None:
    """What is wrong, and what to do, where one of the arrays is there no more; else None."""
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
            return (
                f"the buffer of a tensor, {_describe(x)}, was given away (donated) to a compiled function, which has overwritten it. "
                "Use the tensor that was written, make a copy before the call (.clone(), jnp.copy), or compile with "
                "donate_state=False"
            )
    return None


def _describe(operand: Any) -> str:
    if hasattr(operand, "shape") and hasattr(operand, "dtype"):
        return f"{str(operand.dtype).removeprefix('torch.')}{list(operand.shape)}"
    return repr(operand)


failure.user_line = user_line  # type: ignore[attr-defined]
