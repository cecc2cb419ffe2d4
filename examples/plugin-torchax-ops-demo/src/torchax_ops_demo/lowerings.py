"""How the operators are computed, over `jax.Array`s."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax.ops import aten, lowering


@lowering("torchax_ops_demo::rms_norm", promote="default", promote_only=("x", "weight"))
def rms_norm(x: jax.Array, weight: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Arrives in float32 where `x` is float16 or bfloat16; the result is cast back."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def is_tanh(x: Any, approximate: str = "none") -> bool:
    """The predicate: it sees the arguments of a call, shapes and dtypes in place of tensors."""
    return approximate == "tanh"


@lowering(aten.gelu.default, promote="default", when=is_tanh, dtypes=(torch.float16,), platforms=("cpu",), priority=10)
def gelu_tanh(x: jax.Array, approximate: str = "none") -> jax.Array:
    """x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form with one transcendental function."""
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x * jax.nn.sigmoid(2 * u)
