"""`fori_loop` and `scan` with the signatures of `jax.lax`, over torch functions: one program whatever the number of turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import control_flow
from ._operands import leaves_of


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan` of a torch function: ``carry, y = f(carry, x)`` for every row of `xs`.

    Torch's autograd goes through, also to parameters that `f` uses without being given them; what it writes and random numbers
    that it draws are kept up to date from turn to turn.

    Args:
        f: takes the carry and a row, gives the next carry (same nest, shapes and dtypes) and a result.
        init: the first carry, a nest of tensors.
        xs: a nest of tensors, cut along dimension 0; None with a `length`: `f` is then given None.
        length: number of turns, where there are no `xs`.
        reverse: from the last row to the first.

    Returns:
        ``(carry, ys)``: the last carry, and the results stacked along dimension 0.

    Raises:
        ValueError: neither `xs` nor `length`, or the two disagree.
        RuntimeError: `f` gives another carry than it takes.
    """
    if xs is None:
        if length is None:
            raise ValueError("scan needs xs, or the number of turns as length")
        return control_flow.scan(
            lambda carry, _: f(carry, None), init, torch.arange(length, device="jax"), reverse=reverse
        )
    rows = {t.shape[0] for t in leaves_of(xs) if isinstance(t, torch.Tensor)}
    if length is not None and rows != {length}:
        raise ValueError(f"scan was given length={length} and xs of {sorted(rows)} rows")
    return control_flow.scan(f, init, xs, reverse=reverse)


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[torch.Tensor, Any], Any], init_val: Any) -> Any:
    """`jax.lax.fori_loop` of a torch function: ``value = body_fun(i, value)`` for i from `lower` to `upper`, exclusively.

    With ints as bounds gradients go through, as in `scan`. With a tensor as a bound the number of turns is known only when
    the program runs, and gradients are not to be had.

    Args:
        lower: the first i, an int or an integer tensor of one element.
        upper: where it ends.
        body_fun: takes i, an int64 tensor without dimensions, and the value; gives the next value (same nest, shapes, dtypes).
        init_val: the first value, a nest of tensors.

    Returns:
        The last value.
    """
    if isinstance(lower, int) and isinstance(upper, int):
        if upper <= lower:
            return init_val
        steps = torch.arange(lower, upper, device="jax")
        return control_flow.scan(lambda value, i: (body_fun(i, value), i), init_val, steps)[0]
    last = torch.as_tensor(upper, device="jax").long()
    first = torch.as_tensor(lower, device="jax").long()
    _, value = control_flow.while_loop(
        lambda i, _: i < last, lambda i, value: (i + 1, body_fun(i, value)), (first, init_val)
    )
    return value


__all__ = ["fori_loop", "scan"]
