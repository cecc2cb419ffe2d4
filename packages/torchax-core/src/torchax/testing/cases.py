"""Which cases there are: operators of OpInfo, forms, dtypes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
FORMS = (
    "forward",
    "method",
    "inplace",
    "out",
    "view",
    "noncontiguous",
    "conj_neg",
    "grad",
    "gradgrad",
    "forward_ad",
    "jit",
    "vmap",
    "errors",
    "tpu",
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# results are drawn at random whatever the arguments are: compared by shape and dtype
RANDOM = _names("""
    bernoulli cauchy exponential geometric log_normal multinomial normal normal.in_place normal.number_mean
    pca_lowrank rand_like randint randint_like randn randn_like svd_lowrank uniform
    nn.functional.alpha_dropout nn.functional.dropout nn.functional.dropout2d nn.functional.dropout3d
    nn.functional.feature_alpha_dropout.with_train nn.functional.fractional_max_pool2d
    nn.functional.fractional_max_pool3d
""")
# results whose values nobody set: compared by shape, dtype and strides
UNINITIALISED = _names("""
    empty empty_like empty_permuted empty_strided new_empty new_empty_strided resize_ resize_as_
""")
# the shape of the result, or what Python does next, depends on values
DATA_DEPENDENT = _names("""
    __getitem__ allclose argwhere bincount combinations corrcoef cov equal histogramdd item linalg.lstsq
    linalg.lstsq.grad_oriented masked_select masked.median nn.functional.ctc_loss nn.functional.gaussian_nll_loss nn.functional.one_hot nonzero
    repeat_interleave to_sparse unique unique_consecutive
""")


class Case(NamedTuple):
    """One operator in one form and dtype; the dtype of ``errors`` is None."""

    op: Any
    form: str
    dtype: torch.dtype | None

    @property
    def name(self) -> str:
        return f"{self.op.full_name}/{self.form}/{dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype | None) -> str:
    """``float32`` for torch.float32, ``-`` for None."""
    return "-" if dtype is None else str(dtype).removeprefix("torch.")


def is_random(op: Any, sample: Any, form: str) -> bool:
    """Whether results are drawn at random, for this sample in this form."""
    if op.full_name in RANDOM:
        return True
    kwargs = sample.kwargs
    if "dropout_p" in kwargs:
        return kwargs["dropout_p"] > 0
    if op.name == "nn.functional.rrelu":
        return bool(kwargs.get("training", False))
    return op.name == "nn.functional.multi_head_attention_forward"


@functools.cache
def ops() -> tuple[Any, ...]:
    """Every entry of PyTorch's op_db that CPU torch runs; jiterator's compile CUDA source."""
    from torch.testing._internal.common_methods_invocations import op_db

    return tuple(op for op in op_db if op.supported_dtypes("cpu") and not op.name.startswith("jiterator"))


def matching(pattern: str | None) -> list[Any]:
    """The entries whose full name (``name`` or ``name.variant``) matches a regular expression as a whole."""
    return [op for op in ops() if pattern is None or re.fullmatch(pattern, op.full_name)]


def dtypes_of(op: Any, form: str) -> list[torch.dtype | None]:
    """The dtypes in which a form of an operator has cases; none if it has no such form."""
    if form == "errors":
        return [None] if op.error_inputs_func is not None else []
    has = {
        "method": op.method_variant is not None,
        "inplace": op.inplace_variant is not None,
        "out": op.supports_out,
        "gradgrad": op.supports_autograd and op.supports_gradgrad,
        "forward_ad": op.supports_forward_ad,
        "grad": op.supports_autograd,
    }
    if not has.get(form, True):
        return []
    claimed = op.supported_dtypes("cpu")
    if form in ("grad", "gradgrad", "forward_ad"):
        claimed = op.supported_backward_dtypes("cpu")
    restricted = {
        "gradgrad": (torch.float64, torch.complex128),
        "forward_ad": (torch.float64,),
        "conj_neg": (torch.complex64, torch.complex128, *((torch.float64,) if op.test_neg_view else ())),
        "tpu": (torch.float32, torch.bfloat16, torch.int64),
    }
    return [d for d in DTYPES if d in claimed and d in restricted.get(form, DTYPES)]


def enumerate_cases(
    pattern: str | None = None, forms: Any = FORMS, dtypes: Any = None, among: Any = None
) -> Iterator[Case]:
    """The cases of the operators that match, operator by operator."""
    for op in matching(pattern) if among is None else among:
        for form in forms:
            for dtype in dtypes_of(op, form):
                if dtypes is None or dtype is None or dtype in dtypes:
                    yield Case(op, form, dtype)
