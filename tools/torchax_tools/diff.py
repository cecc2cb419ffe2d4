"""What changed between two coverage reports."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from .parity import counts


class BrokenReport(ValueError):
    """A file is no coverage report."""


def read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The operators of a report that ``torchax-ops coverage --format json`` wrote, by name.

    Raises:
        BrokenReport: it cannot be read, or is none.
    """
    try:
        report = json.loads(path.read_text())
        rows = {row["op"]: {"provider": "", "parity": {}, **row, "kind": row["kind"]} for row in report["ops"]}
        if all(map(_is_row, rows.values())):
            return rows
        raise ValueError
    except OSError as error:
        raise BrokenReport(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise BrokenReport(f"{path} is no report of torchax-ops coverage --format json") from None


def _is_row(row: dict[str, Any]) -> bool:
    strings = all(isinstance(row[key], str) for key in ("op", "kind", "provider"))
    forms = row["parity"].values() if isinstance(row["parity"], dict) else [None]
    return strings and all(isinstance(by, dict) and all(isinstance(s, str) for s in by.values()) for by in forms)


def compare(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The operators that differ: ``op``, ``change`` (``worse``, ``better``, ``new``, ``gone``, ``other``), ``before``, ``after``."""
    changes = []
    for op in sorted(old.keys() | new.keys()):
        a, b = old.get(op), new.get(op)
        if a is None or b is None:
            there = b or a
            assert there is not None
            changes.append(_change(op, "new" if a is None else "gone", _said(a), _said(b)))
            continue
        before, after = _said(a), _said(b)
        if before == after:
            continue
        lost = a["kind"] != "missing" and b["kind"] == "missing"
        won = a["kind"] == "missing" and b["kind"] != "missing"
        fails = _fails(b) - _fails(a)
        what = "worse" if lost or fails else "better" if won or _fails(a) - _fails(b) else "other"
        changes.append(_change(op, what, before, after))
    return changes


def _change(op: str, what: str, before: str, after: str) -> dict[str, str]:
    return {"op": op, "change": what, "before": before, "after": after}


def _fails(row: dict[str, Any]) -> set[tuple[str, str]]:
    return {(form, dtype) for form, by in row["parity"].items() for dtype, status in by.items() if status == "fail"}


def _said(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    counted = counts(row["parity"])
    parity = ", ".join(f"{n} {status}" for status, n in counted.items() if n and status != "skip")
    return " ".join(
        part for part in (row["kind"], row["provider"] and f"by {row['provider']}", parity and f"({parity})") if part
    )
