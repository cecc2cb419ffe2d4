"""torch dtypes and the JAX (numpy) dtypes that hold exactly the same values."""

import ml_dtypes
import numpy as np
import torch

from .errors import UnsupportedDtype

TORCH_TO_JAX: dict[torch.dtype, np.dtype] = {
    torch_dtype: np.dtype(numpy_type)
    for torch_dtype, numpy_type in {
        torch.float32: np.float32,
        torch.float64: np.float64,
        torch.bfloat16: ml_dtypes.bfloat16,
        torch.float16: np.float16,
        torch.int64: np.int64,
        torch.int32: np.int32,
        torch.int16: np.int16,
        torch.int8: np.int8,
        torch.uint8: np.uint8,
        torch.uint16: np.uint16,
        torch.uint32: np.uint32,
        torch.uint64: np.uint64,
        torch.bool: np.bool_,
        torch.complex64: np.complex64,
        torch.complex128: np.complex128,
        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
        torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz,
        torch.float8_e5m2: ml_dtypes.float8_e5m2,
        torch.float8_e5m2fnuz: ml_dtypes.float8_e5m2fnuz,
    }.items()
}
JAX_TO_TORCH: dict[np.dtype, torch.dtype] = {v: k for k, v in TORCH_TO_JAX.items()}


def to_jax(dtype: torch.dtype) -> np.dtype:
    """The JAX dtype that holds the values of `dtype`.

    Raises:
        UnsupportedDtype: JAX has no such type (quantized dtypes, ``complex32``).
    """
    try:
        return TORCH_TO_JAX[dtype]
    except KeyError:
        raise UnsupportedDtype(
            f"{dtype} has no counterpart in JAX, so a tensor on device 'jax' cannot hold it; "
            f"convert it first, e.g. with .to({_suggestion(dtype)}). Supported: "
            + ", ".join(str(d) for d in TORCH_TO_JAX)
        ) from None


def to_torch(dtype: "np.dtype | type") -> torch.dtype:
    """The torch dtype that holds the values of the JAX `dtype`.

    Raises:
        UnsupportedDtype: torch has no such type (``int4``, PRNG keys).
    """
    try:
        return JAX_TO_TORCH[dtype if isinstance(dtype, np.dtype) else np.dtype(dtype)]
    except (KeyError, TypeError):
        raise UnsupportedDtype(
            f"JAX dtype {dtype} has no counterpart in torch; convert the array first, e.g. with "
            "array.astype(...), or pass jax.random.key_data(key) for a PRNG key"
        ) from None


def is_wide(dtype: torch.dtype) -> bool:
    """Whether JAX needs its 64-bit mode to hold `dtype` exactly."""
    return dtype in _WIDE


_WIDE = frozenset({torch.float64, torch.int64, torch.uint64, torch.complex128})


def _suggestion(dtype: torch.dtype) -> str:
    if dtype is torch.complex32:
        return "torch.complex64"
    return "torch.float32 (after .dequantize())"
