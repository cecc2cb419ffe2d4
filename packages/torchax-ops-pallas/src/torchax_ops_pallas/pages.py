"""What the operators over a cache of keys and values in pages share: checks of arguments, no gradient, and what their kernels take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .blocks import LANES


def check_ranks(name: str, **tensors: tuple[torch.Tensor, int]) -> None:
    """ValueError unless each tensor has so many dimensions."""
    for argument, (t, rank) in tensors.items():
        if t.dim() != rank:
            raise ValueError(f"{name} takes {argument} with {rank} dimensions; its shape is {list(t.shape)}")


def check_dtypes(query: torch.Tensor, *pages: torch.Tensor, **integers: torch.Tensor) -> None:
    """TypeError unless query and pages are of one floating-point dtype, and the others int32."""
    dtypes = [query.dtype, *(t.dtype for t in pages)]
    if len(set(dtypes)) > 1 or not query.dtype.is_floating_point:
        raise TypeError(
            f"query and pages must be of one floating-point dtype; they are {', '.join(str(d) for d in dtypes)}"
        )
    for argument, t in integers.items():
        if t.dtype != torch.int32:
            raise TypeError(f"{argument} must be int32; it is {t.dtype}: call .int()")


def check_soft_cap(soft_cap: float | None) -> None:
    """ValueError unless it caps."""
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, or None for scores as they are; it is {soft_cap}")


def refuse_gradient(name: str, library: torch.library.Library) -> None:
    """Give an operator a backward that raises: without one, gradients would be left out silently."""

    def backward(*_: Any) -> Any:
        raise NotImplementedError(f"{name} has no gradient: it serves decoding; call it under torch.no_grad()")

    torch.library.register_autograd(name, backward, lib=library)


def unfit(query: Any, page_size: int, *others: Any) -> str | None:
    """Why JAX's kernels cannot serve a call; None if they can."""
    conditions: tuple[tuple[bool, Callable[[], str]], ...] = (
        (query.dtype.name == "bfloat16", lambda: f"the kernel computes in bfloat16, the dtype is {query.dtype}"),
        (query.shape[2] % LANES == 0, lambda: f"heads must be a multiple of {LANES} wide, they are {query.shape[2]}"),
        (page_size % 8 == 0, lambda: f"page_size must be a multiple of 8, it is {page_size}"),
        (all(0 not in x.shape for x in (query, *others)), lambda: "an operand is empty"),
    )
    return next((words() for holds, words in conditions if not holds), None)
