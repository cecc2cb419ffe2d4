"""Which calls of `scaled_dot_product_attention` a kernel takes, each condition with words for a no."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .settings import mode

DTYPES = ("float32", "bfloat16")
SHORTEST = 64  # below it the scores are small, and one fused softmax of XLA is as good
WIDEST = 256


def unfit(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Why no kernel can serve the call, whatever the platform; None if one can."""
    if not query.ndim == key.ndim == value.ndim == 4:
        dimensions = ", ".join(str(t.ndim) for t in (query, key, value))
        return f"query, key and value must be [batch, heads, length, features], they have {dimensions} dimensions"
    heads_fit = query.shape[1] == key.shape[1] or (enable_gqa and key.shape[1] and query.shape[1] % key.shape[1] == 0)
    conditions = (
        (dropout_p == 0.0, lambda: f"the kernels have no dropout, dropout_p is {dropout_p}"),
        (
            scale is None or isinstance(scale, float | int),
            lambda: "scale must be a number, it is a traced value",
        ),
        (
            query.dtype == key.dtype == value.dtype and query.dtype.name in DTYPES,
            lambda: f"dtypes must be one of {', '.join(DTYPES)}, they are {query.dtype}, {key.dtype}, {value.dtype}",
        ),
        (
            query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1:3] == value.shape[1:3],
            lambda: f"batches must be equal, not broadcast: {query.shape}, {key.shape}, {value.shape}",
        ),
        (heads_fit, lambda: f"{query.shape[1]} query heads do not share {key.shape[1]} key heads"),
        (
            query.shape[3] == key.shape[3] and all(1 <= t.shape[3] <= WIDEST for t in (query, value)),
            lambda: f"heads must be 1 to {WIDEST} wide, they are {query.shape[3]}, {key.shape[3]}, {value.shape[3]}",
        ),
        (
            0 not in query.shape and query.shape[2] >= SHORTEST and key.shape[2] >= SHORTEST,
            lambda: (
                f"{query.shape[2]} queries and {key.shape[2]} keys are too few: from {SHORTEST} on a kernel is worth it"
            ),
        ),
        (attn_mask is None or _mask_fits(attn_mask, query, key), lambda: _about_mask(attn_mask, query, key)),
    )
    return next((words() for holds, words in conditions if not holds), None)


def _mask_fits(mask: Any, query: Any, key: Any) -> bool:
    full = (*query.shape[:3], key.shape[2])
    return (
        (mask.dtype == jnp.bool_ or mask.dtype.name in DTYPES)
        and 2 <= mask.ndim <= 4
        and mask.shape[-1] == full[-1]
        and all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False))
    )


def _about_mask(mask: Any, query: Any, key: Any) -> str:
    return (
        f"the mask must be bool, {' or '.join(DTYPES)}, and broadcast to {(*query.shape[:3], key.shape[2])} with all "
        f"{key.shape[2]} keys given; it is {mask.dtype} {mask.shape}"
    )


class Condition:
    """A predicate of lowerings that can say why not."""

    def __init__(self, name: str, refusal: Callable[..., str | None]):
        self.__name__, self.refusal = name, refusal

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        return self.refusal(*args, **kwargs) is None


def _on_tpu(*args: Any, **kwargs: Any) -> str | None:
    if mode() == "off":
        return "torchax.config.pallas is 'off'"
    return unfit(*args, **kwargs)


def _interpreted(*args: Any, **kwargs: Any) -> str | None:
    if mode() != "interpret":
        return f"torchax.config.pallas is {mode()!r}, not 'interpret'"
    return unfit(*args, **kwargs)


def _refused(*_args: Any, **_kwargs: Any) -> str | None:
    return None if mode() == "required" else f"torchax.config.pallas is {mode()!r}, not 'required'"


on_tpu = Condition("a kernel fits", _on_tpu)
interpreted = Condition("kernels are interpreted and one fits", _interpreted)
required = Condition("a kernel is required", _refused)
