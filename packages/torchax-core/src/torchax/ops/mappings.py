"""Conversions under the names that existing users of torchax import."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..convert import j2t, t2j
from ..dtypes import JAX_TO_TORCH, TORCH_TO_JAX, to_jax, to_torch

TORCH_DTYPE_TO_JAX = TORCH_TO_JAX
JAX_DTYPE_TO_TORCH = JAX_TO_TORCH


def t2j_dtype(dtype: torch.dtype) -> np.dtype:
    """The JAX dtype of a torch dtype."""
    return to_jax(dtype)


def j2t_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a JAX dtype."""
    return to_torch(dtype)


__all__ = ["JAX_DTYPE_TO_TORCH", "TORCH_DTYPE_TO_JAX", "j2t", "j2t_dtype", "t2j", "t2j_dtype"]
