"""Cross entropy of a linear layer without its logits: `torch.nn.functional.linear_cross_entropy` on device ``jax``."""

import functools
import math
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn import _reduction as _Reduction
from torchax.dtypes import to_jax
from torchax.ops import lowering
from torchax.tensor import Tensor

from ._common import MEAN, SUM, accumulator
from ._index import check_range
from ._logits import Layer, Rows, losses_of_rows, total_loss

_library = torch.library.Library("torchax", "FRAGMENT")
_library.define(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias=None, "
    "Tensor? weight=None, int reduction=1, int ignore_index=-100, float label_smoothing=0., "
    "ScalarType? dtype=None, int rows=0) -> Tensor"
)


@torch.library.impl(_library, "linear_cross_entropy", "CompositeImplicitAutograd")
def in_parts(
    input,
    linear_weight,
    target,
    linear_bias=None,
    weight=None,
    reduction=MEAN,
    ignore_index=-100,
    label_smoothing=0.0,
    dtype=None,
    rows=0,
):
    """The meaning, in torch's own ops: what gradients of gradients, `vmap` and forward-mode AD go through."""
    logits = F.linear(input, linear_weight, linear_bias)
    logits = logits if dtype is None else logits.to(dtype)
    return torch.ops.aten.cross_entropy_loss(logits, target, weight, reduction, ignore_index, label_smoothing)


@lowering("torchax::linear_cross_entropy", whole=True, checks=True, products=True)
def linear_cross_entropy(
    input,
    linear_weight,
    target,
    linear_bias=None,
    weight=None,
    reduction=MEAN,
    ignore_index=-100,
    label_smoothing=0.0,
    dtype=None,
    rows=0,
):
    """The cross entropy of the logits ``input @ linear_weight.T + linear_bias`` with class indices.

    Args:
        input: ``[N, K]`` or ``[K]``.
        linear_weight: ``[C, K]``.
        target: ``[N]`` or ``[]``, class indices.
        linear_bias: ``[C]`` or None.
        weight: ``[C]``, how much a class counts; None for 1.
        reduction: ATen's number of ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: the target of rows that do not count.
        label_smoothing: share of a target that is spread over all classes.
        dtype: dtype of the result; None for that of `input`.
        rows: rows whose logits exist at a time; 0 for a choice by the number of classes.

    Returns:
        ``[N]`` or ``[]`` for reduction ``"none"``, else ``[]``; computed in float32, or float64 if given that.
    """
    precise, classes, shape = accumulator(input.dtype), linear_weight.shape[0], target.shape
    target = target.reshape(-1)
    counts = target != ignore_index
    target = jnp.where(counts, target, 0)
    check_range(target, classes, message="Target {} is out of bounds.")
    weight = None if weight is None else weight.astype(precise)
    scale = counts.astype(precise)
    of_rows = Rows(
        input.reshape(-1, input.shape[-1]),
        target.astype(np.int32),
        counts,
        scale if weight is None else jnp.where(counts, weight.at[target].get(mode="clip"), 0),
    )
    total = jnp.sum(of_rows.scale)
    if label_smoothing:
        smoothed = {"scale": of_rows.scale * (1 - label_smoothing), "smooth": scale * (label_smoothing / classes)}
        of_rows = of_rows._replace(**smoothed)
    layer = Layer(linear_weight, linear_bias, weight)
    if reduction in (MEAN, SUM):
        loss = total_loss(of_rows, layer, rows)
    else:
        loss = losses_of_rows(of_rows, layer, rows).reshape(shape)
    if reduction == MEAN:  # NaN if no row counts, but gradients are 0 then
        loss = jnp.where(total == 0, jnp.nan, loss / jnp.where(total == 0, 1, total))
    return loss.astype(input.dtype if dtype is None else to_jax(dtype))


# In front of torch's function ---------------------------------------------------------------------------------------


def install() -> None:
    """Have `torch.nn.functional.linear_cross_entropy` look whether its tensors are on device ``jax``; once."""
    original = F.linear_cross_entropy
    if hasattr(original, "__torchax__"):
        return

    @functools.wraps(original)
    def front(input: Any, linear_weight: Any, target: Any, *, options: Any = None, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or type(input) is not Tensor or input.dim() not in (1, 2):
            return original(input, linear_weight, target, options=options, **kwargs)
        rows = 0 if options is None else _rows(options, input, linear_weight)
        return _ours(original, rows)(input, linear_weight, target, **kwargs)

    front.__torchax__ = original  # type: ignore[attr-defined]
    F.linear_cross_entropy = front


def _rows(options: Any, input: torch.Tensor, linear_weight: torch.Tensor) -> int:
    """What torch's options say of the rows of a chunk; 0 if that is left to the device."""
    if options.batch_chunk_size is None and options.chunking_method in (None, "auto"):
        return 0
    sizes = {"num_batches": math.prod(input.shape[:-1]), "in_features": input.shape[-1]}
    return options._adjust(**sizes, num_classes=linear_weight.shape[0], dtype=input.dtype).batch_chunk_size


class _Product:
    """The logits, as torch's function handles them: not computed."""

    def __init__(self, *layer: Any):
        self.layer = layer

    def reshape(self, shape: tuple[int, ...]) -> "_Product":
        self.shape = shape
        return self


@functools.lru_cache(64)
def _ours(original: Any, rows: int) -> Any:
    """Torch's function with its checks, but for the two calls that make the logits and take them."""

    def cross_entropy(
        logits: _Product, target: Any, weight: Any, reduction: str, ignore_index: int, label_smoothing: float
    ) -> Any:
        input, linear_weight, bias = logits.layer
        number = _Reduction.get_enum(reduction)
        # other targets, more dimensions, gradients of the weights of classes: torch's parts have, or refuse, them
        parts = target.dtype != torch.int64 or len(logits.shape) != input.dim() or not 0.0 <= label_smoothing <= 1.0
        if parts or (weight is not None and weight.requires_grad):
            made = F.linear(input, linear_weight, bias).reshape(logits.shape)
            return torch.ops.aten.cross_entropy_loss(made, target, weight, number, ignore_index, label_smoothing)
        dtype = None
        if torch.is_autocast_enabled("jax"):
            low, dtype = torch.get_autocast_dtype("jax"), torch.float32
            input, linear_weight, bias = (None if t is None else t.to(low) for t in (input, linear_weight, bias))
        op = torch.ops.torchax.linear_cross_entropy
        return op(input, linear_weight, target, bias, weight, number, ignore_index, label_smoothing, dtype, rows)

    names = {**vars(F), "linear": _Product, "cross_entropy": cross_entropy}
    made = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made
