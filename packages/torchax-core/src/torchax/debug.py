"""Looking at values while a compiled function runs."""

from __future__ import annotations

from typing import Any

import jax
import torch
from torch.utils._pytree import tree_map

from ._execute import state
from .convert import t2j
from .tensor import Tensor


def print(fmt: str, *args: Any, ordered: bool = False, **kwargs: Any) -> None:
    """Print values when the program runs; eagerly, at once. (Python's own `print` in a compiled function runs while recording.)

    ``torchax.debug.print("loss {} norm {norm}", loss, norm=norm)``. On a device other than CPU the lines arrive some time
    after the call; `jax.effects_barrier` waits for them.

    Args:
        fmt: a format string, as for `str.format`, with a place for each value.
        args: tensors, nests of tensors, or anything else that can be printed, for ``{}``.
        ordered: keep the order of several prints (costs speed; not under `jax.vmap`).
        kwargs: the same for ``{name}``.

    Raises:
        ValueError: `fmt` has not as many places as there are values.
        TypeError: `fmt` is not a string.
    """
    if not isinstance(fmt, str):
        raise TypeError(
            f'torchax.debug.print takes a format string first, as in print("loss {{}}", loss); got {type(fmt).__name__}'
        )
    args, kwargs = tree_map(_value, (args, kwargs))
    with jax.enable_x64(True):
        jax.debug.print(fmt, *args, ordered=ordered, **kwargs)


def _value(x: Any) -> Any:
    if type(x) is Tensor:
        return state.executor.read(x)
    return t2j(x) if isinstance(x, torch.Tensor) else x


__all__ = ["print"]
