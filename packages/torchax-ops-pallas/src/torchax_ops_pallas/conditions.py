"""Which calls a kernel takes: what the setting says, and the shapes and dtypes of attention, each condition with words for a no."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from torchax.errors import TorchaxError
from torchax.ops import divided

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


class KernelUnavailable(TorchaxError, RuntimeError):
    """``torchax.config.pallas`` is ``"required"``, and no kernel serves the call; says which condition failed."""


class Condition:
    """A predicate of lowerings that can say why not."""

    def __init__(self, name: str, refusal: Callable[..., str | None]):
        self.__name__, self.refusal = name, refusal

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        return self.refusal(*args, **kwargs) is None


class Choice:
    """When kernels serve an operator, by ``torchax.config.pallas``: the conditions of its lowerings.

    Args:
        name: the operator, for messages.
        unfit: why no kernel can serve a call, whatever the platform; None if one can.
        kernel: what fits, in words.
        one: the same, where kernels have been spoken of.
        divisible: XLA may divide the kernel over devices.

    Attributes:
        on_tpu: of the lowering for TPUs.
        interpreted: of the one that runs on this machine.
        required: of the one that raises `unavailable`, which has the lowest priority.
    """

    def __init__(
        self,
        name: str,
        unfit: Callable[..., str | None],
        kernel: str = "a kernel",
        one: str = "one",
        divisible: bool = True,
    ):
        self._name, self._unfit, self._divisible = name, unfit, divisible
        self.on_tpu = Condition(f"{kernel} fits", self._on_tpu)
        self.interpreted = Condition(f"kernels are interpreted and {one} fits", self._interpreted)
        self.required = Condition("a kernel is required", lambda *_args, **_kwargs: _not("required"))

    def _on_tpu(self, *args: Any, **kwargs: Any) -> str | None:
        if mode() == "off":
            return "torchax.config.pallas is 'off'"
        if not self._divisible and divided():
            return "tensors are divided over devices, and XLA cannot divide a kernel: call it in torchax.interop.jax_shard_map"
        return self._unfit(*args, **kwargs)

    def _interpreted(self, *args: Any, **kwargs: Any) -> str | None:
        return _not("interpret") or self._unfit(*args, **kwargs)

    def unavailable(self, *args: Any, **kwargs: Any) -> KernelUnavailable:
        """The error of ``"required"`` for a call that no kernel takes."""
        reason = self.on_tpu.refusal(*args, **kwargs)
        reason = reason or "the kernels are compiled for platform tpu alone; 'interpret' runs them on this one"
        return KernelUnavailable(
            f"torchax.config.pallas is 'required', but no kernel serves {self._name} here: {reason}"
        )


def _not(wanted: str) -> str | None:
    return None if mode() == wanted else f"torchax.config.pallas is {mode()!r}, not {wanted!r}"
