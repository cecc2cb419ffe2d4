"""Gradients of the step before as memory for those of the next.

`zero_grad` within a step lets go of the last gradients only when the call is over, and then the new ones are there: both would be
held at once. A program that leaves gradients takes the last ones as inputs that it does not read, and overwrites them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from torchax._sharding import place
from torchax._storage import Storage
from torchax.tensor import Tensor

if TYPE_CHECKING:
    from ._program import Program
    from ._recorder import Recorder

Spare = tuple[Storage, Storage]  # of a gradient, and of its parameter


def spares_of(program: Program, recorder: Recorder) -> list[Spare]:
    """The gradients that every call of the program makes anew and that lie as their parameters do."""
    if recorder.differentiable or not program.settled or not recorder.options.donate_state:
        return []
    made = set(program.survivors)
    found = {
        grad._s: t._s
        for t, grad in program.set_grads
        if type(grad) is Tensor and type(t) is Tensor and grad._s in made and grad._s.geometry is t._s.geometry
    }
    return [(s, t) for s, t in found.items() if program.mesh is None or s.sharding is not None]


def values_of(spares: list[Spare], instead: Callable[[Any], Any]) -> list[Any]:
    """The arrays to overwrite; `instead` of the parameter's payload where no call has left one that fits."""
    pairs = [(s.value, t.value) for s, t in spares]
    return [last if _interchangeable(last, model) else instead(model) for last, model in pairs]


def _interchangeable(a: Any, b: Any) -> bool:
    """Whether a program that was compiled for one of them takes the other."""
    if not isinstance(a, jax.Array) or isinstance(a, jax.core.Tracer) or a.is_deleted():
        return False
    return (a.shape, a.dtype, a.sharding, a.committed) == (b.shape, b.dtype, b.sharding, b.committed)


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """What stands for an array like `x` where nothing runs."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)


def zeros_like(x: jax.Array) -> jax.Array:
    """An array that lies where `x` does; compiles nothing."""
    zeros = np.zeros(x.shape, x.dtype)
    return place(zeros, x.sharding) if x.committed else jnp.asarray(zeros)
