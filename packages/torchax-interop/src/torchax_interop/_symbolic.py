"""Python floats whose values are inputs of a program: torch computes with them, and none of them is compiled in.

While a step of an optimizer is recorded, a `torch.SymFloat` stands for each float of its groups; torch's argument parser takes
it wherever a number is expected. Behind it is a `Number`, which knows what it is now, how it is found again at a later call,
and its traced value. Python's questions (``momentum != 0``) are answered with what is true now; the answers are noted, and a
call that would answer otherwise records again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torchax._execute import state
from torchax._storage import Storage, dense_meta

_UNSEEN = object()
_UNCHANGING = (float, int, tuple)
_NUMBERS = (float, int, torch.Tensor)


class Setting:
    """An entry of an optimizer's group that is an input of the program: a number, or a nest of one level with numbers in it.

    Attributes:
        group: the group.
        name: the entry's key.
        recorded: the entry when it was recorded.
        parts: position -> storage of each number; the position is None where the entry is a number itself.
        seen: the entry that the storages' values are of, where its identity says that nothing has changed.
    """

    __slots__ = ("group", "name", "parts", "recorded", "seen")

    def __init__(self, group: dict[str, Any], name: str, parts: dict[int | None, Storage]):
        self.group, self.name, self.parts = group, name, parts
        self.recorded, self.seen = group[name], _UNSEEN

    def last(self) -> Any:
        """The entry at the last call."""
        return self.recorded if self.seen is _UNSEEN else self.seen

    def fits(self) -> bool:
        """Whether the entry holds numbers where it did, and what it did elsewhere."""
        before = self.recorded
        value: Any = self.group.get(self.name)
        if None in self.parts:
            return _is_number(value)
        return (
            type(value) is type(before)
            and len(value) == len(before)
            and all(_is_number(x) if i in self.parts else x == before[i] for i, x in enumerate(value))
        )

    def refresh(self) -> None:
        """Give the storages what the entry holds now."""
        value = self.group[self.name]
        for at, storage in self.parts.items():
            storage.value = np.float64(float(value if at is None else value[at]))
        self.seen = value if isinstance(value, _UNCHANGING) else _UNSEEN


def _is_number(value: Any) -> bool:
    kind = type(value)
    return kind is float or (kind is not bool and isinstance(value, _NUMBERS))


class Check(NamedTuple):
    """A question about numbers that the recording has asked.

    Attributes:
        ask: asks it again.
        answer: what the answer was.
        settings: on which it depends.
    """

    ask: Callable[[], Any]
    answer: Any
    settings: frozenset[Setting]

    def holds(self) -> bool:
        """Whether the answer is still the same."""
        try:
            return self.ask() == self.answer
        except (ArithmeticError, LookupError, TypeError):  # no numbers any more, or others than Python can compute with
            return False


class Number:
    """The node of a `torch.SymFloat`, with the methods by which torch asks for arithmetic and comparisons.

    Args:
        checks: where questions are noted.
        value: the number now.
        find: finds it again.
        trace: gives its traced value: an array without dimensions, weakly typed as Python's numbers are, or a Python number.
        settings: on which it depends.
    """

    def __init__(
        self,
        checks: list[Check],
        value: float,
        find: Callable[[], float],
        trace: Callable[[], Any],
        settings: frozenset[Setting],
    ):
        self.checks, self.hint, self.find, self.operand, self.settings = checks, value, find, trace, settings

    # ------------------------------------------------------------------ what torch asks of a node
    def is_int(self) -> bool:
        return False

    def is_float(self) -> bool:
        return True

    def is_bool(self) -> bool:
        return False

    def is_nested_int(self) -> bool:
        return False

    def is_symbolic(self) -> bool:
        return True

    def is_constant(self) -> bool:
        return False

    def has_hint(self) -> bool:
        return True

    def wrap_float(self, value: float) -> Number:
        return Number(self.checks, value, lambda: value, lambda: value, frozenset())

    wrap_int = wrap_float

    def guard_float(self, file: str, line: int) -> float:
        """The number itself, which is a constant of the program from now on."""
        self.checks.append(Check(self.find, self.hint, self.settings))
        return self.hint

    def bool_(self) -> bool:
        return self.asked(bool)

    def _graph_repr(self) -> str:
        return repr(self.hint)

    str = _graph_repr

    # ------------------------------------------------------------------ arithmetic and questions
    def computed(self, compute: Callable[..., Any], *others: Number) -> Number:
        """The number that follows from this one and `others`."""
        numbers = (self, *others)
        return Number(
            self.checks,
            compute(*[n.hint for n in numbers]),
            lambda: compute(*[n.find() for n in numbers]),
            lambda: compute(*[n.operand() for n in numbers]),
            self.settings.union(*[n.settings for n in others]),
        )

    def asked(self, question: Callable[..., bool], *others: Number) -> bool:
        """The answer, now; it is noted."""
        numbers = (self, *others)
        answer = question(*[n.hint for n in numbers])
        ask = lambda: question(*[n.find() for n in numbers])
        self.checks.append(Check(ask, answer, self.settings.union(*[n.settings for n in others])))
        return answer

    def neg(self) -> Number:
        return self.computed(operator.neg)

    def add(self, other: Number) -> Number:
        return self.computed(operator.add, other)

    def sub(self, other: Number) -> Number:
        return self.computed(operator.sub, other)

    def mul(self, other: Number) -> Number:
        return self.computed(operator.mul, other)

    def float_truediv(self, other: Number) -> Number:
        if other.settings:
            other.bool_()  # by zero, Python raises an error, which no program does
        return self.computed(operator.truediv, other)

    def float_pow(self, other: Number) -> Number:
        return self.computed(operator.pow, other)

    def eq(self, other: Number) -> _Answer:
        return _Answer(self.asked(operator.eq, other))

    def ne(self, other: Number) -> _Answer:
        return _Answer(self.asked(operator.ne, other))

    def lt(self, other: Number) -> _Answer:
        return _Answer(self.asked(operator.lt, other))

    def le(self, other: Number) -> _Answer:
        return _Answer(self.asked(operator.le, other))

    def gt(self, other: Number) -> _Answer:
        return _Answer(self.asked(operator.gt, other))

    def ge(self, other: Number) -> _Answer:
        return _Answer(self.asked(operator.ge, other))


class _Answer:
    """The node of a `torch.SymBool` of which torch makes a Python bool at once."""

    def __init__(self, answer: bool):
        self.answer = answer

    def is_int(self) -> bool:
        return False

    def is_float(self) -> bool:
        return False

    def is_bool(self) -> bool:
        return True

    def is_constant(self) -> bool:
        return True

    def guard_bool(self, file: str, line: int) -> bool:
        return self.answer


def setting_of(group: dict[str, Any], name: str) -> Setting | None:
    """An entry of an optimizer's group as inputs of a program; None if it holds no floats."""
    value = group[name]
    if isinstance(value, float):
        return Setting(group, name, {None: _storage(value)})
    parts: dict[int | None, Storage] = {}
    if type(value) in (tuple, list):
        parts.update({i: _storage(x) for i, x in enumerate(value) if isinstance(x, float)})
    return Setting(group, name, parts) if parts else None


def symbolic(setting: Setting, checks: list[Check]) -> Any:
    """What stands for the entry while it is recorded."""
    value = setting.group[setting.name]
    if None in setting.parts:
        return _symbol(setting, None, value, checks)
    inner = [_symbol(setting, i, x, checks) if i in setting.parts else x for i, x in enumerate(value)]
    return type(value)(inner)


def _storage(value: float) -> Storage:
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return Storage(jnp.array(float(value)), dense_meta((), torch.float64))  # weakly typed, as a Python number is


def _symbol(setting: Setting, at: int | None, value: float, checks: list[Check]) -> torch.SymFloat:
    group, name, storage = setting.group, setting.name, setting.parts[at]
    find = (lambda: group[name]) if at is None else (lambda: group[name][at])
    trace = lambda: state.executor.load(storage)
    return torch.SymFloat(Number(checks, float(value), find, trace, frozenset([setting])))
