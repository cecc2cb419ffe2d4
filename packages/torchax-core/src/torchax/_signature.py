"""What of a call decides the program (the key), and what is handed to it at run time (the operands)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ._execute import state
from ._execute.traced import SYMBOL
from ._registry import Lowering
from .tensor import Tensor

_NUMBERS = (float, int, complex, bool)
_IGNORED = frozenset({"generator", "non_blocking", "pin_memory", "layout"})
DROPPED = frozenset({"device", "memory_format"}) | _IGNORED


class Slot:
    """In a call's template: where operand `index` goes."""

    __slots__ = ("index",)

    def __init__(self, index: int):
        self.index = index


class Signature:
    """How calls of one op are split into key and operands.

    Args:
        func: the op.
        lowerings: its lowerings; they say which numbers are compiled in. Without one, all are.
        numbers: whether ``Scalar`` arguments are operands at all.
    """

    def __init__(self, func: Any, lowerings: Iterable[Lowering], numbers: bool):
        arguments = func._schema.arguments
        static = {name for entry in lowerings for name in entry.static}
        running = {name for entry in lowerings for name in entry.operands}
        self.specialized: dict[str, tuple[Any, ...]] = {}
        for entry in lowerings:
            for name, values in entry.specialize.items():
                self.specialized[name] = (*self.specialized.get(name, ()), *values)
        self.names = tuple(a.name for a in arguments if not a.kwarg_only)
        self.running: dict[str, tuple[Any, ...]] = {}  # name -> values that are compiled in nevertheless
        for a in arguments:
            scalar = "number" in str(a.type) or str(a.type) == "Tensor"  # a Python number may stand for a tensor
            if numbers and a.name not in static and (scalar or a.name in running):
                self.running[a.name] = self.specialized.get(a.name, ())
        self.modes = tuple(self.running.get(name) for name in self.names)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """Key and operands of a call. Operands are Tensors, numbers, symbols of numbers and numpy arrays (0-d CPU tensors)."""
        key: list[Any] = []
        operands: list[Any] = []
        for a, mode in zip(args, self.modes, strict=False):
            if type(a) is Tensor:
                key.append(a._m)
                operands.append(a)
            else:
                _bind(a, mode, key, operands)
        if kwargs:
            for name, a in kwargs.items():
                if name not in _IGNORED:
                    key.append(name)
                    _bind(a, self.running.get(name), key, operands)
        return tuple(key), operands

    def template(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], everything: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with a `Slot` in place of every operand, in the order of `bind`.

        What lowerings never see (``device``, ``layout``, ...) is left out unless `everything` is asked for.
        """
        count = _Count()
        targs = tuple(_template(a, mode, count) for a, mode in zip(args, self.modes, strict=False))
        tkwargs = {
            name: _template(a, self.running.get(name), count) for name, a in kwargs.items() if name not in _IGNORED
        }
        return targs, tkwargs if everything else {k: v for k, v in tkwargs.items() if k not in DROPPED}


class _Count:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0

    def next(self) -> Slot:
        self.n += 1
        return Slot(self.n - 1)


def _bind(a: Any, mode: tuple[Any, ...] | None, key: list[Any], operands: list[Any]) -> None:
    kind = type(a)
    if kind is Tensor:
        key.append(a._m)
        operands.append(a)
    elif kind is list or kind is tuple:
        key.append(len(a))
        for x in a:
            _bind(x, mode, key, operands)
    elif kind in _NUMBERS:
        key.append(kind)
        if mode is None or a in mode:
            key.append(a)
        else:
            operands.append(a)
    elif isinstance(a, torch.Tensor):
        key.append(("cpu", tuple(a.shape), a.dtype))
        operands.append(_host_operand(a))
    elif kind is SYMBOL:
        if mode is None or state.executor.owner is None:
            _bind(float(a), mode, key, operands)
        else:  # as a float that is not compiled in, whatever its value
            key.append(float)
            operands.append(a)
    else:
        key.append(a if kind is not torch.device else _indexed(a))


def _indexed(device: torch.device) -> torch.device:
    """``"jax"`` is another device whenever `torch.jax.set_device` has been called."""
    from .device import with_index

    return with_index(device)


def _template(a: Any, mode: tuple[Any, ...] | None, count: _Count) -> Any:
    kind = type(a)
    if kind is Tensor:
        return count.next()
    if kind is list or kind is tuple:
        return [_template(x, mode, count) for x in a]
    if kind in _NUMBERS:
        return a if mode is None or a in mode else count.next()
    if kind is SYMBOL:
        known = mode is None or state.executor.owner is None
        return _template(float(a), mode, count) if known else count.next()
    return count.next() if isinstance(a, torch.Tensor) else a


def _host_operand(t: torch.Tensor) -> np.ndarray:
    from . import convert

    return convert.host_values(t)


def place(template: Any, operands: Any) -> Any:
    """The template with its slots filled."""
    kind = type(template)
    if kind is Slot:
        return operands[template.index]
    if kind is list:
        return [place(x, operands) for x in template]
    if kind is tuple:
        return tuple(place(x, operands) for x in template)
    if kind is dict:
        return {k: place(v, operands) for k, v in template.items()}
    return template
