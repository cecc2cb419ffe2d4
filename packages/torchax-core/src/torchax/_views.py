"""Views: how a tensor is read from its storage's payload and written into it, as a chain of steps.

A chain is compiled once per (geometry of the storage, steps); positions (where a select or slice begins) are
run-time operands, so that ``x[i]`` in a loop compiles once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._execute import Program
from ._storage import TensorMeta, physical_order, strided_indices

_BETWEEN_TYPES = ("aten::view.dtype", "aten::as_strided(dtype)")


class Step:
    """One view op with its compiled-in arguments. Interned, so that chains are."""

    __slots__ = ("inverse", "name", "positions", "read", "static")

    def __init__(
        self,
        name: str,
        read: Callable[..., Any],
        inverse: Callable[..., Any] | None,
        static: tuple[Any, ...],
        positions: int,
    ):
        self.name, self.read, self.inverse, self.static, self.positions = name, read, inverse, static, positions


class Chain:
    """Steps from a storage's payload to a view's value. Made by `root` and `then` only."""

    __slots__ = ("_next", "_read", "_write", "geometry", "steps")

    def __init__(self, geometry: TensorMeta, steps: tuple[Step, ...]):
        self.geometry, self.steps = geometry, steps
        self._next: dict[Step, Chain] = {}
        self._read: Program | None = None
        self._write: Program | None = None

    def then(self, step: Step) -> Chain:
        """This chain and one more step."""
        chain = self._next.get(step)
        if chain is None:
            chain = self._next.setdefault(step, Chain(self.geometry, (*self.steps, step)))
        return chain

    @property
    def read(self) -> Program:
        """``(payload, *positions) -> value``."""
        if self._read is None:
            self._read = Program(
                lambda payload, *positions: self._values(payload, positions)[-1],
                f"view::{self._name}",
                self._wide,
                self.geometry.index,
            )
        return self._read

    @property
    def write(self) -> Program:
        """``(payload, value, *positions) -> payload``: each step's inverse, from the last to the first."""
        if self._write is None:
            for step in self.steps:
                if step.inverse is None:
                    raise NotImplementedError(
                        f"a view made by {step.name} cannot be written: its lowering gives no inverse"
                    )

            def write(payload: Any, value: Any, *positions: Any) -> Any:
                bases = self._values(payload, positions, last=False)
                end = len(positions)
                for step, base in zip(reversed(self.steps), reversed(bases), strict=True):
                    begin = end - step.positions
                    value = step.inverse(base, value, *step.static, *positions[begin:end])  # type: ignore[misc]
                    end = begin
                return value

            self._write = Program(write, f"write::{self._name}", self._wide, self.geometry.index)
        return self._write

    def _values(self, payload: Any, positions: tuple[Any, ...], last: bool = True) -> list[Any]:
        values, begin = [payload], 0
        for step in self.steps if last else self.steps[:-1]:
            values.append(step.read(values[-1], *step.static, *positions[begin : begin + step.positions]))
            begin += step.positions
        return values

    @property
    def _name(self) -> str:
        return "_".join(step.name.removeprefix("aten::") for step in self.steps)

    @property
    def _wide(self) -> bool:  # view(dtype) may pass through a wider type than the storage's
        return self.geometry.wide or any(step.name in _BETWEEN_TYPES for step in self.steps)


class View:
    """A tensor's place in its storage: chain, positions, offset in elements."""

    __slots__ = ("chain", "offset", "positions")

    def __init__(self, chain: Chain, positions: tuple[Any, ...], offset: int):
        self.chain, self.positions, self.offset = chain, positions, offset

    @property
    def is_traced(self) -> bool:
        """Whether a position is a traced value, which means nothing after the trace."""
        return any(isinstance(p, jax.core.Tracer) for p in self.positions)


def root(geometry: TensorMeta) -> Chain:
    """The empty chain of storages of this geometry."""
    if geometry.root is None:
        geometry.root = Chain(geometry, ())
    return geometry.root


_steps: dict[tuple[Any, ...], Step] = {}


def intern_step(
    name: str, read: Callable[..., Any], inverse: Callable[..., Any] | None, static: tuple[Any, ...], positions: int
) -> Step:
    """The one `Step` of these values."""
    key = (name, read, static, positions)
    step = _steps.get(key)
    if step is None:
        step = _steps.setdefault(key, Step(name, read, inverse, static, positions))
    return step


def strided_view(geometry: TensorMeta, meta: TensorMeta, offset: int) -> View:
    """The view `as_strided` makes of a storage: it counts in the storage's memory, whatever view it came from.

    Args:
        geometry: of the storage.
        meta: of the view. It may have another dtype: it then counts in its own elements, over the same bytes.
        offset: where the view begins, in elements of the view.
    """
    name = "aten::as_strided" if meta.dtype is geometry.dtype else "aten::as_strided(dtype)"
    step = intern_step(name, _strided_read, _strided_write, (geometry, meta, offset), 0)
    return View(root(geometry).then(step), (), offset)


def _strided_read(payload: Any, geometry: TensorMeta, meta: TensorMeta, offset: int) -> Any:
    flat = _reinterpreted(_flat(payload, geometry), meta.jax_dtype)
    index = strided_indices(meta.shape, meta.strides, offset).reshape(-1)
    if (
        index.size
        and index[-1] - index[0] + 1 == index.size
        and np.array_equal(index, np.arange(index[0], index[0] + index.size))
    ):
        return flat[int(index[0]) : int(index[0]) + index.size].reshape(meta.shape)  # one dense run: no gather
    return flat[index.astype(np.int32 if flat.size < 2**31 else np.int64)].reshape(meta.shape)


def _strided_write(payload: Any, value: Any, geometry: TensorMeta, meta: TensorMeta, offset: int) -> Any:
    before = _flat(payload, geometry)
    flat = _reinterpreted(before, meta.jax_dtype)
    index = strided_indices(meta.shape, meta.strides, offset).reshape(-1)
    index = index.astype(np.int32 if flat.size < 2**31 else np.int64)
    after = _reinterpreted(flat.at[index].set(value.reshape(-1), mode="promise_in_bounds"), geometry.jax_dtype)
    if after.size < before.size:  # bytes at the end that make no whole element of the view
        after = jnp.concatenate([after, before[after.size :]])
    order = physical_order(geometry)
    return jnp.transpose(after.reshape([geometry.shape[i] for i in order]), np.argsort(order).tolist())


def _reinterpreted(flat: Any, dtype: np.dtype) -> Any:
    """The bytes of a flat array as numbers of another dtype; those at the end that make no whole number are dropped."""
    if flat.dtype == dtype:
        return flat
    if flat.dtype.kind == "c":
        flat = jnp.stack([flat.real, flat.imag], -1).reshape(-1)
    elif flat.dtype == np.bool_:
        flat = flat.astype(np.uint8)
    plain = (
        np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else np.dtype(np.uint8) if dtype == np.bool_ else dtype
    )
    parts = plain.itemsize // flat.dtype.itemsize
    if parts > 1:
        flat = flat[: flat.size // parts * parts].reshape(-1, parts)
    flat = lax.bitcast_convert_type(flat, plain).reshape(-1)
    if dtype.kind == "c":
        pairs = flat[: flat.size // 2 * 2].reshape(-1, 2)
        return lax.complex(pairs[:, 0], pairs[:, 1])
    return flat != 0 if dtype == np.bool_ else flat


def _flat(payload: Any, geometry: TensorMeta) -> Any:
    """The payload's elements in the order in which they lie in memory."""
    return jnp.transpose(payload, physical_order(geometry)).reshape(-1)
