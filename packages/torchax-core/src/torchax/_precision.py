"""`torch.set_float32_matmul_precision`, as JAX's precision of products."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import torch

_JAX = {"highest": "highest", "high": "high", "medium": "default"}

setting = torch.get_float32_matmul_precision


def products() -> contextlib.AbstractContextManager[Any]:
    """Within, what JAX traces multiplies float32 as torch's setting says; JAX's own setting, where it is given, wins."""
    if jax.config.jax_default_matmul_precision is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return contextlib.nullcontext()
    return jax.default_matmul_precision(_JAX[setting()])
