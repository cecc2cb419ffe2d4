"""Functions that take functions, `torch.cond` or `flex_attention`, go to `torchax.interop` for tensors on device ``jax``.

Torch hands these to Dynamo before anything of ours is asked, so the functions themselves get a look at their arguments first.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ._execute import state
from .tensor import Tensor

_PLACES = {
    "flex_attention": ("torch.nn.attention.flex_attention",),
    "cond": ("torch", "torch._higher_order_ops", "torch._higher_order_ops.cond"),
    "while_loop": ("torch", "torch._higher_order_ops", "torch._higher_order_ops.while_loop"),
    "scan": ("torch._higher_order_ops", "torch._higher_order_ops.scan"),
    "associative_scan": ("torch._higher_order_ops", "torch._higher_order_ops.associative_scan"),
}


def install() -> None:
    """Put the look in front of torch's functions."""
    import torch.nn.attention.flex_attention  # noqa: F401  torch itself does not

    for name, places in _PLACES.items():
        modules = [sys.modules[place] for place in places if place in sys.modules]
        original = getattr(modules[-1], name)
        if hasattr(original, "__torchax__"):
            continue
        wrapper = _looking(name, original)
        for module in modules:
            if getattr(module, name, None) is original:
                setattr(module, name, wrapper)


def _looking(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return original(*args, **kwargs)
        if state.executor.owner is None and not any(type(x) is Tensor for x in tree_leaves((args, kwargs))):
            return original(*args, **kwargs)
        from .interop import control_flow, flex  # type: ignore[attr-defined]

        return getattr(flex if name == "flex_attention" else control_flow, name)(*args, **kwargs)

    call.__torchax__ = original  # type: ignore[attr-defined]
    return call
