"""Views: how a tensor is read from its storage's payload and written into it, as a chain of steps.

A chain is compiled once per (geometry of the storage, steps); positions (where a select or slice begins) are
run-time operands, so that ``x[i]`` in a loop compiles once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._execute import Program
from ._storage import TensorMeta, physical_order, strided_indices


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
        return self.geometry.wide or any(step.name == "aten::view.dtype" for step in self.steps)


class View:
    """A tensor's place in its storage: chain, positions, offset in elements."""

    __slots__ = ("chain", "offset", "positions")

    def __init__(self, chain: Chain, positions: tuple[Any, ...], offset: int):
        self.chain, self.positions, self.offset = chain, positions, offset


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


def strided_view(geometry: TensorMeta, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> View:
    """The view `as_strided` makes of a storage: it counts in the storage's memory, whatever view it came from."""
    step = intern_step("aten::as_strided", _strided_read, _strided_write, (geometry, shape, strides, offset), 0)
    return View(root(geometry).then(step), (), offset)


def _strided_read(
    payload: Any, geometry: TensorMeta, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> Any:
    flat = _flat(payload, geometry)
    index = strided_indices(shape, strides, offset).reshape(-1)
    if (
        index.size
        and index[-1] - index[0] + 1 == index.size
        and np.array_equal(index, np.arange(index[0], index[0] + index.size))
    ):
        return flat[int(index[0]) : int(index[0]) + index.size].reshape(shape)  # one dense run: no gather
    return flat[index.astype(np.int32 if payload.size < 2**31 else np.int64)].reshape(shape)


def _strided_write(
    payload: Any, value: Any, geometry: TensorMeta, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> Any:
    index = strided_indices(shape, strides, offset).reshape(-1).astype(np.int32 if payload.size < 2**31 else np.int64)
    flat = _flat(payload, geometry).at[index].set(value.reshape(-1), mode="promise_in_bounds")
    order = physical_order(geometry)
    return jnp.transpose(flat.reshape([geometry.shape[i] for i in order]), np.argsort(order).tolist())


def _flat(payload: Any, geometry: TensorMeta) -> Any:
    """The payload's elements in the order in which they lie in memory."""
    return jnp.transpose(payload, physical_order(geometry)).reshape(-1)
