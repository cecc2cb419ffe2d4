"""The one list of known differences from CPU torch: each entry with a reason that a user would accept.

It is strict: a listed case that passes fails the test.
"""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

from .cases import FORMS, Case, dtype_name


class Known(NamedTuple):
    """Cases that differ: a glob over full operator names, forms, names of dtypes (None: all), and why."""

    ops: str
    reason: str
    forms: tuple[str, ...] = FORMS
    dtypes: tuple[str, ...] | None = None


_SPARSE = "sparse layouts: JAX arrays are dense"

KNOWN: tuple[Known, ...] = (
    Known("to_sparse", _SPARSE),
    Known("chalf", "complex32 has no counterpart in JAX"),
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
