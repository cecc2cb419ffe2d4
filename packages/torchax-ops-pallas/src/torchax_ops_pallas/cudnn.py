"""cuDNN's attention on NVIDIA's GPUs behind the calling convention of PyTorch: the call that `jax.nn.dot_product_attention` makes.

That function's gradient is divided and batched by rules of its own, which know neither grouped heads nor operands that are batched
differently. So forward and backward are called each by itself, as its gradient calls them, and divided as the other kernels are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from . import reference
from .dividing import over_batch_and_heads


class _Call(NamedTuple):
    """What is compiled in."""

    causal: bool
    scale: float

    @property
    def mask_type(self) -> cudnn.MaskType:
        """What cuDNN calls the mask that is not there as a tensor."""
        return cudnn.MaskType.CAUSAL if self.causal else cudnn.MaskType.NO_MASK


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, *, causal: bool, scale: float
) -> jax.Array:
    """Attention in cuDNN, forward and backward; grouped heads are not repeated, and the scores are not held.

    A mask is added to the scores by cuDNN, which wants it for every query: one that is broadcast over queries is written out.

    Args:
        query: ``[batch, heads, L, E]``, float16 or bfloat16, as all tensors.
        key: ``[batch, key heads, S, E]``; the number of key heads divides that of heads.
        value: ``[batch, key heads, S, E]``.
        mask: bool (True: seen) or added to the scores, ``[L or 1, S]`` behind up to two dimensions that broadcast.
        causal: whether query i sees, besides, the keys up to i alone.
        scale: factor of the scores.

    Returns:
        ``[batch, heads, L, E]`` in the dtype of `query`; zeros where a query sees nothing.
    """
    call = _Call(causal, scale)
    if mask is None:
        return _attend(call, query, key, value)
    length, keys = query.shape[2], key.shape[2]
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    seen = mask if mask.dtype == jnp.bool_ else mask != -jnp.inf
    # Minus infinity would become NaN where cuDNN subtracts it from itself; JAX's own masks stop at this number.
    hidden = cudnn.get_large_negative_number(query.dtype)
    bias = jnp.where(seen, jnp.zeros((), query.dtype) if mask.dtype == jnp.bool_ else jnp.maximum(mask, hidden), hidden)
    out: Any = _attend(call, query, key, value, jnp.broadcast_to(bias, (*bias.shape[:2], length, keys)))
    if causal:
        rows, columns = (lax.broadcasted_iota(jnp.int32, (length, keys), i) for i in (0, 1))
        seen = seen & (columns <= rows)
    return jnp.where(seen.any(-1, keepdims=True), out, jnp.zeros_like(out))


def _dims(bias: tuple[jax.Array, ...]) -> tuple[str, ...]:
    """Letters of the bias for `over_batch_and_heads`: where it is of size one it is broadcast."""
    return tuple(("1" if b.shape[0] == 1 else "b") + ("1" if b.shape[1] == 1 else "h") + "qk" for b in bias)


def _with_lengths_first(*tensors: jax.Array) -> list[jax.Array]:
    """``[batch, heads, length, features]`` as ``[batch, length, heads, features]``, or back.

    Models make their heads by such a transposition; here it is undone, and nothing is copied.
    """
    return [t.swapaxes(1, 2) for t in tensors]


def _run_forward(call: _Call, training: bool, query: Any, key: Any, value: Any, bias: tuple[Any, ...]) -> Any:
    """The result, and while `training` with the logarithm of each row's sum of exponentials."""

    def cudnn_forward(query: Any, key: Any, value: Any, *bias: Any) -> Any:
        query, key, value = _with_lengths_first(query, key, value)
        found: Any = cudnn.dot_product_attention(
            query,
            key,
            value,
            bias[0] if bias else None,
            scale=call.scale,
            mask_type=call.mask_type,
            return_residual=training,
        )
        out, *statistics = found if training else (found,)
        return (*_with_lengths_first(out), *statistics)

    inputs = ("bhqd", "bgkd", "bgkd", *_dims(bias))
    return over_batch_and_heads(
        cudnn_forward, inputs, ("bhqd", "bhq") if training else ("bhqd",), query, key, value, *bias
    )


def _run_backward(
    call: _Call, query: Any, key: Any, value: Any, out: Any, statistics: Any, grad: Any, bias: Any
) -> Any:
    def cudnn_backward(query: Any, key: Any, value: Any, out: Any, grad: Any, statistics: Any, *bias: Any) -> Any:
        query, key, value, out, grad = _with_lengths_first(query, key, value, out, grad)
        none = jnp.zeros(0, query.dtype)
        found = cudnn._dot_product_attention_bwd_p_wrapper.bind(
            query,
            key,
            value,
            *(bias or (none,)),
            *(none,) * 6,  # lengths, offsets and pages
            statistics,
            out,
            grad,
            scale=call.scale,
            seed=0,
            dropout_rate=0.0,
            variadic_args=(bool(bias), False),  # whether there is a bias, and its gradient
            mask_type=call.mask_type,
            layout=cudnn.AttentionLayout.BTNH.value,
            sliding_window_length=None,
        )
        return tuple(_with_lengths_first(*found))

    inputs = ("bhqd", "bgkd", "bgkd", "bhqd", "bhqd", "bhq", *_dims(bias))
    outputs = ("bhqd", "bgkd", "bgkd")
    return over_batch_and_heads(cudnn_backward, inputs, outputs, query, key, value, out, grad, statistics, *bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, query: jax.Array, key: jax.Array, value: jax.Array, *bias: jax.Array) -> jax.Array:
    return _run_forward(call, False, query, key, value, bias)[0]


def _attend_forward(call: _Call, query: Any, key: Any, value: Any, *bias: Any) -> Any:
    learned = () if any(b.perturbed for b in bias) else None
    query, key, value, *rest = (x.value for x in (query, key, value, *bias))
    out, statistics = _run_forward(call, True, query, key, value, tuple(rest))
    return out, (query, key, value, tuple(rest), out, statistics, learned)


def _attend_backward(call: _Call, saved: Any, grad: Any) -> Any:
    query, key, value, bias, out, statistics, learned = saved
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return (None,) * (3 + len(bias))
    d_bias: tuple[Any, ...] = (None,) * len(bias)
    if learned is not None:  # as large as the scores of all heads: XLA computes it
        plain = lambda b: reference.attention(query, key, value, b, causal=call.causal, scale=call.scale)
        d_bias = jax.vjp(plain, *bias)[1](grad)
    return *_run_backward(call, query, key, value, out, statistics, grad, bias), *d_bias


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
