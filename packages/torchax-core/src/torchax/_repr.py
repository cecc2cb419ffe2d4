"""`repr` of a tensor, in PyTorch's words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.core
import torch
from torch import _tensor_str

if TYPE_CHECKING:
    from .tensor import Tensor

_IMPLIED = {torch.int64, torch.bool}


def tensor_repr(t: Tensor) -> str:
    """``tensor([1., 2.], device='jax:0')``; while tracing, shape and dtype in place of values."""
    plain = t.detach()
    suffixes = []
    value = plain.jax()
    if isinstance(value, jax.core.Tracer):
        contents = f"<traced {value.aval.str_short()}>"
        suffixes.append(f"device='{t.device}'")
    elif not (value.is_fully_addressable or value.is_fully_replicated):
        contents = f"<{value.aval.str_short()} over several processes, {value.sharding}>"
        suffixes.append(f"device='{t.device}'")
    else:
        host = plain.cpu()
        contents = _tensor_str._tensor_str(host, len("tensor(")) if host.numel() else "[]"
        suffixes.append(f"device='{t.device}'")
        if not host.numel() and host.dim() != 1:
            suffixes.append(f"size={tuple(host.shape)}")
        implied = t.dtype in _IMPLIED if host.numel() else False
        if not implied and t.dtype not in (
            torch.get_default_dtype(),
            torch.complex64 if torch.get_default_dtype() is torch.float32 else torch.complex128,
        ):
            suffixes.append(f"dtype={t.dtype}")
    if t.grad_fn is not None:
        name = type(t.grad_fn).__name__
        suffixes.append(f"grad_fn=<{type(t.grad_fn)._forward_cls.__name__ if name == 'CppFunction' else name}>")  # type: ignore[attr-defined]
    elif t.requires_grad:
        suffixes.append("requires_grad=True")
    text = _tensor_str._add_suffixes("tensor(" + contents, suffixes, len("tensor("), False)
    return f"Parameter containing:\n{text}" if isinstance(t, torch.nn.Parameter) else text
