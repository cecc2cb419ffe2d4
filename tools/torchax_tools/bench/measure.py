"""How things are timed: both sides of a ratio in turn, in batches long enough to be warm, the lower quartile of each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from torchax.tensor import Tensor

Thunk = Callable[[], Any]


@dataclasses.dataclass
class Row:
    """One line of the report.

    Attributes:
        group: what was asked for on the command line.
        name: what was measured.
        value: the ratio, or the seconds or the count, in `unit`.
        unit: ``"x"`` for a ratio, ``"s"``, or what is counted.
        against: what the ratio is taken to.
        goal: the largest value that torchax aims at (the smallest if `more`); None without one.
        ours: seconds of our side, or what is counted.
        theirs: seconds of the other side, or what is counted.
        torch_cpu: seconds of torch on CPU, if measured.
        more: larger is better.
        error: why there is no value.
        counted: what `ours` and `theirs` are.
    """

    group: str
    name: str
    value: float | None = None
    unit: str = "x"
    against: str = ""
    goal: float | None = None
    ours: float | None = None
    theirs: float | None = None
    torch_cpu: float | None = None
    more: bool = False
    error: str = ""
    counted: str = "s"

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal or a value."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.more else self.value <= self.goal


def wait(result: Any) -> None:
    """Until the arrays in `result` (tensors, arrays, or nests of them) are there."""
    for leaf in jax.tree.leaves(result):
        if isinstance(leaf, Tensor):
            leaf = leaf.jax()
        if isinstance(leaf, jax.Array):
            leaf.block_until_ready()


def times(*sides: Thunk, rounds: int = 15, batch: float = 0.02) -> list[float]:
    """Seconds per call of each of `sides`, measured in turn so that a busy moment of the machine meets all of them.

    Args:
        sides: the things to time; each is warmed up first.
        rounds: how often each is measured.
        batch: seconds that one measurement should take.

    Returns:
        The lower quartile over the rounds, for each side.
    """
    counts = []
    for side in sides:
        wait(side())
        calls, start = 0, time.perf_counter()
        while calls < 3 or time.perf_counter() - start < batch:
            wait(side())
            calls += 1
        counts.append(calls)
    seen: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, count, mine in zip(sides, counts, seen, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                result = side()
            wait(result)
            mine.append((time.perf_counter() - start) / count)
    return [sorted(mine)[rounds // 4] for mine in seen]


def ratio(
    group: str,
    name: str,
    ours: Thunk,
    theirs: Thunk,
    against: str,
    goal: float | None,
    cpu: Thunk | None = None,
    **how: Any,
) -> Row:
    """Time `ours` against `theirs`, then torch on CPU; an exception becomes a row that says so.

    Not all three in turn: torch's threads spin for a while after each operator, on the cores of whoever comes next.
    """
    try:
        mine, other = times(ours, theirs, **how)
        rest = times(cpu, **how) if cpu else []
    except Exception as error:
        return failed(group, name, error)
    return Row(group, name, mine / other, "x", against, goal, mine, other, rest[0] if rest else None)


def failed(group: str, name: str, error: BaseException) -> Row:
    """A row for something that could not be measured."""
    text = str(error).strip().splitlines()
    return Row(group, name, error=f"{type(error).__name__}: {text[-1][:120] if text else ''}")
