"""Strict: every op is a compiled program of its own, run at once (JAX queues it on the device)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from .. import errors
from .._sharding import place, placed_program
from .._storage import Storage
from ..config import config
from ..tensor import Tensor
from . import Program, set_default
from ._where import failure

enable_x64 = jax.enable_x64


class Strict:
    """See the module."""

    owner = None

    def run(self, program: Program, operands: Sequence[Any]) -> Any:
        arrays = [(o._s.value if o._v is None else self.read(o)) if type(o) is Tensor else o for o in operands]
        try:
            if not program.wide:
                return program.jitted(*arrays)
            with enable_x64(True):
                return program.jitted(*arrays)
        except Exception as error:
            raise failure(error, program.name, arrays) from error

    def read(self, tensor: Tensor) -> Any:
        storage, view = tensor._s, tensor._v
        if view is None:
            return storage.value
        cached = tensor._cache
        if cached is None or cached[0] != storage.version:
            value = self.run(view.chain.read, (storage.value, *view.positions))
            cached = tensor._cache = (storage.version, value)
        return cached[1]

    def write(self, tensor: Tensor, value: Any) -> None:
        storage, view = tensor._s, tensor._v
        if view is not None:
            value = self.run(view.chain.write, (storage.value, value, *view.positions))
        storage.value = value if storage.sharding is None else place(value, storage.sharding)
        storage.version += 1

    def load(self, storage: Storage) -> Any:
        return storage.value

    def store(self, storage: Storage, value: Any) -> None:
        storage.value = value if storage.sharding is None else place(value, storage.sharding)
        storage.version += 1


class Placed(Strict):
    """Strict, but results of one shape are made where a sharding says."""

    def __init__(self, shape: tuple[int, ...], sharding: Any):
        self._shape, self._sharding = shape, sharding

    def run(self, program: Program, operands: Sequence[Any]) -> Any:
        arrays = [self.read(o) if type(o) is Tensor else o for o in operands]
        try:
            with enable_x64(True):
                return placed_program(program, self._shape, self._sharding)(*arrays)
        except Exception as error:
            raise failure(error, program.name, arrays) from error


class Debug(Strict):
    """Strict, but every op is waited for, so that an error shows at the op that caused it."""

    def run(self, program: Program, operands: Sequence[Any]) -> Any:
        out = super().run(program, operands)
        try:
            jax.block_until_ready(out)
        except Exception as error:
            raise failure(error, program.name, operands) from error
        if config.nan_check:
            self._check_nan(program, operands, out)
        return out

    def _check_nan(self, program: Program, operands: Sequence[Any], out: Any) -> None:
        if not any(_has_nan(x) for x in jax.tree.leaves(out)):
            return
        values = [self.read(o) if type(o) is Tensor else o for o in operands]
        if any(_has_nan(x) for x in values):
            return  # it came in already
        raise errors.NaNFound(f"{program.name} turned operands without NaN into NaN{failure.user_line()}")


def _has_nan(x: Any) -> bool:
    if not isinstance(x, (jax.Array, np.ndarray)) or isinstance(x, jax.core.Tracer):
        return isinstance(x, float) and x != x
    return np.dtype(x.dtype).kind not in "iub" and bool(
        np.isnan(np.asarray(x).astype(np.complex128 if x.dtype.kind == "c" else np.float64)).any()
    )


STRICT, DEBUG = Strict(), Debug()
set_default(STRICT)
config.on_change("eager", lambda value: set_default(DEBUG if value == "debug" else STRICT))
