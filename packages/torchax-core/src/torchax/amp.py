"""``torch.autocast("jax")``: which ops run in the low precision, which in float32, which in the widest of their operands.

Kernels on the ``AutocastPrivateUse1`` key cast and call again with the key excluded; without autocast they are never entered.
The lists are those that PyTorch documents for its accelerators (https://docs.pytorch.org/docs/stable/amp.html, "Autocast Op Reference").
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

LOWER = (
    "matmul", "mm", "bmm", "mv", "addmm", "addmv", "addr", "addbmm", "baddbmm", "linear", "chain_matmul", "linalg_multi_dot",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "conv_tbc",
    "prelu", "scaled_dot_product_attention", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "_grouped_mm",
)  # fmt: skip
FLOAT32 = (
    "acos", "asin", "cosh", "sinh", "tan", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm", "group_norm",
    "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss",
    "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss",
    "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp", "softmax.int", "log_softmax.int",
    "cross_entropy_loss", "prod", "prod.dim_int", "cumsum", "cumprod", "sum", "sum.dim_IntList", "norm.Scalar", "norm.ScalarOpt_dim", "linalg_vector_norm",
    "rms_norm", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d",
)  # fmt: skip
WIDEST = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "scatter_add", "tensordot", "cat", "stack",
)  # fmt: skip
_KEY = torch._C.DispatchKey.AutocastPrivateUse1  # pyright: ignore[reportAttributeAccessIssue]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_library: torch.library.Library | None = None
_others: torch.library.Library | None = None


def install() -> None:
    """Register the kernels, once."""
    global _library, _others
    if _library is not None:
        return
    _others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    _others.fallback(torch.library.fallthrough_kernel)  # type: ignore[arg-type]
    _library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for names, target in ((LOWER, _lower_dtype), (FLOAT32, lambda flat: torch.float32), (WIDEST, _widest)):
        for name in names:
            packet, _, overload = name.partition(".")
            found = getattr(torch.ops.aten, packet, None)
            if found is None or (overload or "default") not in found.overloads():
                continue
            _library.impl(name, _kernel(getattr(found, overload or "default"), target))
    torch.get_autocast_dtype = _get_autocast_dtype
    torch.set_autocast_dtype = _set_autocast_dtype
    _library.impl("binary_cross_entropy", _refuse_binary_cross_entropy)


# C++ keeps the dtype for each thread, and every thread starts with float16
class _Thread(threading.local):
    has_dtype = False


_thread = _Thread()
_torch_get, _torch_set = torch.get_autocast_dtype, torch.set_autocast_dtype


def _get_autocast_dtype(device_type: str) -> torch.dtype:
    """`torch.get_autocast_dtype`: for ``jax`` bfloat16, which every platform computes well, if the thread has set no other."""
    if device_type == "jax" and not _thread.has_dtype:
        _set_autocast_dtype("jax", torch.bfloat16)
    return _torch_get(device_type)


def _set_autocast_dtype(device_type: str, dtype: torch.dtype) -> None:
    """`torch.set_autocast_dtype`."""
    _torch_set(device_type, dtype)
    if device_type == "jax":
        _thread.has_dtype = True


def _kernel(op: Any, target: Callable[[list[torch.Tensor]], torch.dtype]) -> Callable[..., Any]:
    def autocast(*args: Any, **kwargs: Any) -> Any:
        flat = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dtype in _FLOATS]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
            if not flat:
                return op(*args, **kwargs)
            dtype = target(flat)
            cast = lambda x: (
                x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in _FLOATS and x.dtype != dtype else x
            )
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return autocast


def _lower_dtype(flat: list[torch.Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype("jax")


def _widest(flat: list[torch.Tensor]) -> torch.dtype:
    if any(x.dtype is torch.float32 for x in flat) or len({x.dtype for x in flat}) > 1:
        return torch.float32
    return flat[0].dtype


def _refuse_binary_cross_entropy(*args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
        if args[0].dtype in (torch.float16, torch.bfloat16):
            raise RuntimeError(
                "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast; "
                "use binary_cross_entropy_with_logits (torch.nn.BCEWithLogitsLoss) instead"
            )
        return torch.ops.aten.binary_cross_entropy.default(*args, **kwargs)


class autocast(torch.amp.autocast_mode.autocast):  # the name torch.cuda.amp has
    """``torch.autocast("jax", ...)``.

    Args:
        device_type: ``"jax"``; a bool stands for `enabled`, as in `torch.cuda.amp.autocast`.
        dtype: what products, convolutions and attention run in.
        enabled: False switches autocast off inside of another one.
        cache_enabled: whether weights are cast once for several uses.
        env: a `torchax.default_env`; not needed.
    """

    def __init__(
        self,
        device_type: str | torch.device | bool = "jax",
        dtype: torch.dtype = torch.bfloat16,
        enabled: bool = True,
        cache_enabled: bool = True,
        env: Any = None,
    ):
        if isinstance(device_type, bool):
            device_type, enabled = "jax", device_type
        kind = torch.device(device_type).type
        if kind != "jax":
            raise ValueError(f"torchax.amp.autocast is for device 'jax'; got {kind!r}: use torch.autocast({kind!r})")
        super().__init__("jax", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)
