"""Errors that depend on values (an index out of range), found without waiting for the device.

A lowering states them with `raise_if`. Its compiled program then gives one small array more, the flag; flags are
looked at when this thread next brings a value to the host, and the first that is raised names its op. In debug mode
they are looked at after each op. Inside a function that JAX traces nothing is computed: reads out of range are clamped
there and writes dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_MANY = 64  # flags that may wait before those that are there are looked at


class Check(NamedTuple):
    """What a flag stands for."""

    error: type[Exception]
    message: str


class _Local(threading.local):
    collected: list[tuple[Check, jax.Array]] | None = None  # while a program is traced: what its lowering states

    def __init__(self) -> None:
        self.waiting: list[tuple[str, list[Check], tuple[Any, ...]]] = []


_local = _Local()


def raise_if(bad: Any, error: type[Exception], message: str, value: Any = None) -> None:
    """In a lowering declared with ``checks=True``: raise `error` once it is known that an element of `bad` is True.

    Args:
        bad: bool array of any shape.
        error: the class of the exception.
        message: its text; ``{}`` stands for the first bad element's `value`.
        value: integer or bool array that broadcasts with `bad`.
    """
    collected = _local.collected
    if collected is None or not bad.size:
        return
    flag = jnp.any(bad).astype(jnp.int64)
    if value is not None:
        first = jnp.argmax(bad.reshape(-1))
        flag = jnp.stack([flag, jnp.broadcast_to(value, bad.shape).reshape(-1)[first].astype(jnp.int64)])
    collected.append((Check(error, message), flag))


def checked(run: Callable[..., Any], checks: list[Check]) -> Callable[..., Any]:
    """`run` as a function that gives its result and the flags stated in it; `checks` says what they stand for."""

    def both(*operands: Any) -> tuple[Any, tuple[jax.Array, ...]]:
        outer, _local.collected = _local.collected, []
        try:
            out = run(*operands)
            checks[:] = [check for check, _ in _local.collected]
            return out, tuple([flag for _, flag in _local.collected])
        finally:
            _local.collected = outer

    return both


def wait_for(name: str, checks: list[Check], flags: tuple[jax.Array, ...]) -> None:
    """Look at the flags of op `name` later."""
    waiting = _local.waiting
    waiting.append((name, checks, flags))
    if len(waiting) >= _MANY:
        ready = [all(flag.is_ready() for flag in flags) for _, _, flags in waiting]
        done = ready.index(False) if False in ready else len(ready)
        _local.waiting = waiting[done:]
        _look(waiting[:done])


def settle() -> None:
    """Look at all flags of this thread that wait.

    Raises:
        Exception: what the first op with a raised flag stated.
    """
    waiting = _local.waiting
    if waiting:
        _local.waiting = []
        _look(waiting)


def _look(waiting: list[tuple[str, list[Check], tuple[Any, ...]]]) -> None:
    for (name, checks, _), flags in zip(waiting, jax.device_get([flags for *_, flags in waiting]), strict=True):
        for check, flag in zip(checks, flags, strict=True):
            values = np.atleast_1d(flag)
            if values[0]:
                raise check.error(f"{check.message.format(*values[1:])} (found in {name})")
