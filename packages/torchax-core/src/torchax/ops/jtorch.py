"""`register_function`, under the name that existing users of torchax import: another implementation for a function of torch."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..convert import t2j
from ..environment import default_env
from ..tensor import Tensor


def register_function(
    torch_fn: Callable[..., Any] | list[Callable[..., Any]], *, is_jax_function: bool = True, needs_env: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate what a function of torch shall do where a tensor on device ``jax`` is among its arguments.

    The function is replaced where torch has it (``torch.nn.functional.softmax`` in `torch.nn.functional`),
    so code that imported the function itself before is not reached. To lower an operator, use `torchax.ops.lowering`.

    Args:
        torch_fn: the function, or several.
        is_jax_function: the decorated function takes and gives `jax.Array`s, not tensors.
        needs_env: it takes the environment as ``env=``.
    """
    functions = list(torch_fn) if isinstance(torch_fn, list | tuple) else [torch_fn]

    def mark(fn: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            _replace(function, fn, is_jax_function, needs_env)
        return fn

    return mark


def _replace(function: Any, fn: Callable[..., Any], is_jax_function: bool, needs_env: bool) -> None:
    function = getattr(function, "__torchax_original__", function)
    homes, name = _homes(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(type(x) is Tensor for x in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        if needs_env:
            kwargs["env"] = default_env()
        if not is_jax_function:
            return fn(*args, **kwargs)
        from ..interop import call_jax

        return call_jax(fn, *tree_map(_on_device, args), **tree_map(_on_device, kwargs))

    call.__torchax_original__ = function  # type: ignore[attr-defined]
    for home in homes:
        setattr(home, name, call)


def _on_device(x: Any) -> Any:
    return Tensor(t2j(x)) if isinstance(x, torch.Tensor) and type(x) is not Tensor else x


def _homes(function: Any) -> tuple[list[Any], str]:
    """Where a function of torch is found, and under which name: `torch.nn.functional` has some of `torch._C._nn`."""
    name = getattr(function, "__name__", "")
    module = getattr(function, "__module__", None)
    places = [importlib.import_module(module)] if module else []
    places += [torch.nn.functional, torch, torch.Tensor, torch.linalg, torch.fft, torch.special]
    found = [(place, getattr(place, name, None)) for place in dict.fromkeys(places)]
    homes = [place for place, f in found if f is not None and getattr(f, "__torchax_original__", f) is function]
    if homes:
        return homes, name
    raise ValueError(f"{function!r} is not found in a module of torch under its own name; register a lowering instead")


__all__ = ["register_function"]
