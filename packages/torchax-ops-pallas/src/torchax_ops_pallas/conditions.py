"""Which calls a kernel takes: what the setting says, and the shapes and dtypes of attention, each condition with words for a no."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo  # jax.nn has it loaded; what JAX knows of cuDNN is nowhere else
from torchax.convert import platform, portable
from torchax.errors import TorchaxError
from torchax.ops import Lowering, op_name

from .settings import mode

DTYPES = ("float32", "bfloat16")
CUDNN_DTYPES = ("float16", "bfloat16")
SHORTEST = 64  # below it a block of a kernel is mostly padding
# Scores of fewer pairs of a query and a key, or of fewer bytes in all, stay in the vector memory between XLA's steps.
PAIRS, SCORES = 512 * 512, 4 * 2**20
WIDEST = 256
_AMPERE, _HOPPER = (8, 0), (9, 0)


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
    """Why no Pallas kernel can serve the call, whatever the platform; None if one can."""
    reason = _unfit_shapes(query, key, value, scale, enable_gqa, DTYPES)
    if reason is not None:
        return reason
    return _first_no(
        (0 <= dropout_p < 1, lambda: f"dropout_p must be at least 0 and less than 1, it is {dropout_p}"),
        (
            all(1 <= t.shape[3] <= WIDEST for t in (query, value)),
            lambda: f"heads must be 1 to {WIDEST} wide, they are {_widths(query, key, value)}",
        ),
        _about_mask(attn_mask, query, key, DTYPES),
    )


def small(query: Any, key: Any, *_args: Any, **_kwargs: Any) -> str | None:
    """Why XLA serves a call as well as a kernel, which can; None if it does not."""
    queries, keys = query.shape[2], key.shape[2]
    scores = 4 * math.prod(query.shape[:2]) * queries * keys
    if queries * keys >= PAIRS or scores >= SCORES:
        return None
    return (
        f"the scores are small, {queries} by {keys} and {scores / 2**20:.2g} MiB in all: a kernel is worth it from 512 by 512 "
        f"or {SCORES / 2**20:.0f} MiB on"
    )


def unfit_on_gpu(
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
    """Why cuDNN's attention cannot serve the call on the GPU at hand, or on one compiled for; None if it can.

    The conditions are those of `jax.nn.dot_product_attention` in JAX 0.10, and those without which the result would not be PyTorch's.
    """
    reason = _unfit_shapes(query, key, value, scale, enable_gqa, CUDNN_DTYPES)
    if reason is not None:
        return reason
    length, keys, width = query.shape[2], key.shape[2], query.shape[3]
    widest, lacking = cudnn_at_hand()
    return _first_no(
        (dropout_p == 0.0, lambda: f"cuDNN takes the seed of dropout when it is compiled, dropout_p is {dropout_p}"),
        (
            width == value.shape[3] and width % 8 == 0 and 0 < width <= widest,
            lambda: f"heads must be a multiple of 8 wide, {widest} at most, they are {_widths(query, key, value)}",
        ),
        (
            not is_causal or length == keys,
            lambda: f"causal attention must have as many keys as queries, there are {keys} and {length}",
        ),
        _about_mask(attn_mask, query, key, (query.dtype.name,)),
        (
            attn_mask is None or length % 2 == keys % 2 == 0,
            lambda: f"with a mask, lengths must be even, they are {length} and {keys}",
        ),
        (lacking is None, lambda: str(lacking)),
    )


def cudnn_at_hand() -> tuple[int, str | None]:
    """How wide heads may be, and why cuDNN cannot be called at all, or None.

    Where this machine has no GPU the program is compiled for one elsewhere; what every GPU that cuDNN's attention runs on can do holds.
    """
    device = jax.devices()[0]
    nvidias = device.platform != "gpu" or "cuda" in device.client.platform_version
    known = device.platform == "gpu" and nvidias
    capability = tuple(int(n) for n in device.compute_capability.split(".")) if known else _AMPERE
    lacking = _first_no(
        (nvidias, lambda: "cuDNN is for NVIDIA's GPUs"),
        (
            fused_attention_stablehlo.cuda_versions is not None,
            lambda: "JAX has no CUDA plugin here: pip install 'torchax[cuda]'",
        ),
        (
            capability >= _AMPERE,
            lambda: (
                f"cuDNN's attention needs an Ampere GPU or a later one, the compute capability is {device.compute_capability}"
            ),
        ),
        (not portable(), lambda: "cuDNN's calls are not among those that a program to be kept may make"),
    )
    return WIDEST if capability >= _HOPPER else WIDEST // 2, lacking


_Condition = tuple[bool, Callable[[], str]]


def _first_no(*conditions: _Condition) -> str | None:
    return next((words() for holds, words in conditions if not holds), None)


def _unfit_shapes(
    query: Any, key: Any, value: Any, scale: Any, enable_gqa: bool, dtypes: tuple[str, ...]
) -> str | None:
    """What all kernels of attention ask of query, key and value."""
    if not query.ndim == key.ndim == value.ndim == 4:
        dimensions = ", ".join(str(t.ndim) for t in (query, key, value))
        return f"query, key and value must be [batch, heads, length, features], they have {dimensions} dimensions"
    heads_fit = query.shape[1] == key.shape[1] or (enable_gqa and key.shape[1] and query.shape[1] % key.shape[1] == 0)
    return _first_no(
        (
            scale is None or isinstance(scale, float | int),
            lambda: "scale must be a number, it is a traced value",
        ),
        (
            query.dtype == key.dtype == value.dtype and query.dtype.name in dtypes,
            lambda: f"dtypes must be one of {', '.join(dtypes)}, they are {query.dtype}, {key.dtype}, {value.dtype}",
        ),
        (
            query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1:3] == value.shape[1:3],
            lambda: f"batches must be equal, not broadcast: {query.shape}, {key.shape}, {value.shape}",
        ),
        (heads_fit, lambda: f"{query.shape[1]} query heads do not share {key.shape[1]} key heads"),
        (
            query.shape[3] == key.shape[3],
            lambda: f"queries and keys must be equally wide, they are {_widths(query, key, value)}",
        ),
        (
            0 not in query.shape and query.shape[2] >= SHORTEST and key.shape[2] >= SHORTEST,
            lambda: f"{query.shape[2]} queries and {key.shape[2]} keys are too few: a kernel takes {SHORTEST} or more",
        ),
    )


def _widths(*tensors: Any) -> str:
    return ", ".join(str(t.shape[3]) for t in tensors)


def _about_mask(mask: Any, query: Any, key: Any, dtypes: tuple[str, ...]) -> _Condition:
    if mask is None:
        return True, str
    full = (*query.shape[:3], key.shape[2])
    fits = (
        (mask.dtype == jnp.bool_ or mask.dtype.name in dtypes)
        and 2 <= mask.ndim <= 4
        and mask.shape[-1] == full[-1]
        and all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False))
    )
    return (
        fits,
        lambda: (
            f"the mask must be bool, {' or '.join(dtypes)}, and broadcast to {full} with all "
            f"{key.shape[2]} keys given; it is {mask.dtype} {mask.shape}"
        ),
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
        unfit_on_gpu: as `unfit`, of a kernel for GPUs, if there is one.
        small: why ``"auto"`` leaves a call that a kernel for TPUs can serve to XLA; None if it does not.

    Attributes:
        on_tpu: of the lowering for TPUs.
        on_gpu: of the lowering for GPUs.
        interpreted: of the one that runs on this machine.
        required: of the one that raises `unavailable`, which has the lowest priority.
    """

    def __init__(
        self,
        name: str,
        unfit: Callable[..., str | None],
        kernel: str = "a kernel",
        one: str = "one",
        unfit_on_gpu: Callable[..., str | None] | None = None,
        small: Callable[..., str | None] = lambda *_args, **_kwargs: None,
    ):
        self._name, self._unfit, self._unfit_on_gpu, self._small = name, unfit, unfit_on_gpu, small
        self.on_tpu = Condition(f"{kernel} fits", self._on_tpu)
        self.on_gpu = Condition("cuDNN's kernel fits", self._on_gpu)
        self.interpreted = Condition(f"kernels are interpreted and {one} fits", self._interpreted)
        self.required = Condition("a kernel is required", lambda *_args, **_kwargs: _not("required"))

    def _on_tpu(self, *args: Any, **kwargs: Any) -> str | None:
        if mode() == "off":
            return "torchax.config.pallas is 'off'"
        reason = self._unfit(*args, **kwargs)
        return self._small(*args, **kwargs) if reason is None and mode() == "auto" else reason

    def _on_gpu(self, *args: Any, **kwargs: Any) -> str | None:
        if mode() == "off":
            return "torchax.config.pallas is 'off'"
        assert self._unfit_on_gpu is not None
        return self._unfit_on_gpu(*args, **kwargs)

    def _interpreted(self, *args: Any, **kwargs: Any) -> str | None:
        return _not("interpret") or self._unfit(*args, **kwargs)

    def unavailable(self, *args: Any, **kwargs: Any) -> KernelUnavailable:
        """The error of ``"required"`` for a call that no kernel takes."""
        on_gpu = self._unfit_on_gpu is not None and platform(0) == "gpu"
        reason = (self.on_gpu if on_gpu else self.on_tpu).refusal(*args, **kwargs)
        platforms = "platform tpu" if self._unfit_on_gpu is None else "platforms tpu and gpu"
        reason = reason or f"the kernels are compiled for {platforms} alone; 'interpret' runs them on this one"
        return KernelUnavailable(
            f"torchax.config.pallas is 'required', but no kernel serves {self._name} here: {reason}"
        )

    def refusals(self, op: Any, **attributes: Any) -> list[Lowering]:
        """The lowering that raises `unavailable`, for a module's name."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            """The error of ``torchax.config.pallas = "required"`` for calls that no kernel takes."""
            raise self.unavailable(*args, **kwargs)

        refuse.__qualname__ = "refuse"  # reports show it
        return [Lowering(op=op_name(op), fn=refuse, when=self.required, priority=8, **attributes)]


def _not(wanted: str) -> str | None:
    return None if mode() == wanted else f"torchax.config.pallas is {mode()!r}, not {wanted!r}"
