"""An operator of our own: what it computes on CPU, the shape of its result, and its gradient."""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("torchax_ops_demo::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x` over its root mean square along the last axis, times `weight`. Any shape; the dtype of `x`."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    x, weight = ctx.saved_tensors
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
    normed, inner = x * scale, grad * weight
    grad_x = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return grad_x, (grad * normed).sum(tuple(range(x.dim() - 1))), None


rms_norm.register_autograd(_backward, setup_context=_save)
