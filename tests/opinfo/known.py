"""The one list of known differences from CPU torch: each entry with a reason that a user would accept.

It is strict: a listed case that passes fails the test.
"""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

from torchax.testing.cases import FORMS, Case, dtype_name


class Known(NamedTuple):
    """Cases that differ: a glob over full operator names, forms, names of dtypes (None: all), and why."""

    ops: str
    reason: str
    forms: tuple[str, ...] = FORMS
    dtypes: tuple[str, ...] | None = None


_SPARSE = "sparse layouts: JAX arrays are dense"

_COMPLEX32 = "complex32 has no counterpart in JAX"
_STATISTICS = "the statistics saved for 16-bit inputs are float32, as on other accelerators; CPU torch rounds them"
_LSTSQ = "values agree; CPU's strides are those of a window of LAPACK's padded buffer"
_TIES = "equal elements may come in any order, and the gradients with them; in 16 bits there are many"
_EIG = "JAX computes no general eigenvalues on TPU"
_HOST = "LAPACK on the host: XLA has no such factorization"
_STORAGE = "a compiled function is given the values of a view, not the storage behind it"
_HALVES = ("bfloat16", "float16")

KNOWN: tuple[Known, ...] = (
    Known("to_sparse", _SPARSE),
    Known("chalf", _COMPLEX32),
    Known("complex", _COMPLEX32, ("forward", "out", "noncontiguous", "grad", "jit", "vmap"), ("float16",)),
    Known("view_as_complex", _COMPLEX32, ("forward", "view", "grad", "jit", "vmap"), ("float16",)),
    Known("sort", _TIES, ("grad",), _HALVES),
    Known("msort", _TIES, ("grad",), _HALVES),
    *(
        Known(op, _STATISTICS, ("forward", "noncontiguous", "jit", "vmap"), _HALVES)
        for op in ("native_layer_norm", "native_batch_norm", "_native_batch_norm_legit")
    ),
    Known("_batch_norm_with_update", _STATISTICS, ("forward", "noncontiguous", "jit"), _HALVES),
    Known("gather", "out= overlaps the index only once it is resized, which happens after the check here", ("errors",)),
    Known("fft.ihfftn", "over one dimension CPU torch leaves out= unwritten; here it is written", ("out",)),
    Known(
        "cumsum",
        "written into float32 out= it sums in float32; CPU torch rounds the inputs to that, but sums in float64",
        ("out",),
        ("float64", "complex128"),
    ),
    Known(
        "logsumexp",
        "for real out= CPU torch drops the imaginary part before the logarithm; here it is dropped at the end",
        ("out",),
        ("complex128",),
    ),
    Known("linalg.lstsq*", _LSTSQ, ("forward", "noncontiguous")),
    Known("linalg.ldl_*", _HOST, ("jit", "tpu")),
    Known("linalg.eig", _EIG, ("tpu",), ("float32",)),
    Known("linalg.eigvals", _EIG, ("tpu",), ("float32",)),
    Known(
        "narrow",
        "a start given as a tensor is read on the host by torch itself; slice or index with it",
        ("jit", "tpu"),
    ),
    Known(
        "logspace.tensor_overload",
        "under vmap torch takes some 0-d tensors for numbers, which it does for CPU tensors only",
        ("vmap",),
        ("int64", "int32"),
    ),
    Known("as_strided.partial_views", _STORAGE, ("jit", "tpu")),
    Known("as_strided.partial_views", "torch asserts in its own bookkeeping of dual views", ("forward_ad",)),
)


def entries(case: Case) -> list[Known]:
    """The entries that a case falls under."""
    return [
        entry
        for entry in KNOWN
        if fnmatch.fnmatchcase(case.op.full_name, entry.ops)
        and case.form in entry.forms
        and (entry.dtypes is None or dtype_name(case.dtype) in entry.dtypes)
    ]


def reason(case: Case) -> str | None:
    """Why a case is known to differ; None if it is to pass."""
    found = entries(case)
    return found[0].reason if found else None
