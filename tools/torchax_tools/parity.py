"""What the tests found out about each operator: the results file of OpInfo cases, by ATen operator."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

STATUSES = ("pass", "known", "fail", "skip")
Parity = dict[str, dict[str, str]]  # form -> dtype -> status
_KEYS = {"op", "form", "dtype", "status"}


class BrokenResults(ValueError):
    """A results file is not one."""


class Results:
    """The cases of a results file, looked up by the name of an ATen operator."""

    def __init__(self, records: list[dict[str, Any]]):
        self._records: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        self.count = len(records)
        for record in records:
            for name in _names(record):
                self._records[name].append(record)

    def of(self, op: str) -> Parity:
        """By form and dtype, the worst that became of the cases of an operator: ``fail``, ``known``, ``pass`` or ``skip``.

        Of an in-place operator that is the form ``inplace`` of the functional one, of an ``out=`` overload ``out``, of a
        backward operator the gradients.
        """
        packet, _, overload = op.removeprefix("aten::").partition(".")
        name, forms = packet.lstrip("_"), None
        if "out" in overload.split("_"):
            forms = ("out",)
        elif name.endswith("_backward"):
            name, forms = name.removesuffix("_backward"), ("grad", "gradgrad")
        elif name.endswith("_"):
            name, forms = name.removesuffix("_"), ("inplace",)
        name = name.removeprefix("native_")
        found: Parity = {}
        for record in self._records.get(name, ()):
            form, dtype = record["form"], record["dtype"]
            if forms is not None and form not in forms:
                continue
            status = "known" if record["status"] == "fail" and record.get("known") else record["status"]
            if status == "skip" and found.get(form, {}).get(dtype):
                continue
            held = found.setdefault(form, {}).get(dtype, "skip")
            found[form][dtype] = min(held, status, key=("fail", "known", "pass", "skip").index)
        return found


def _names(record: dict[str, Any]) -> set[str]:
    """The ATen operators, without leading underscores, that an OpInfo is about."""
    name = record["op"]
    for prefix in ("nn.functional.", "_refs.", "masked."):
        name = name.removeprefix(prefix)
    names = {name.replace(".", "_"), *record.get("aten", ())}
    return {n.strip("_").removeprefix("native_") for n in names}


def counts(parity: Parity, dtype: str | None = None) -> dict[str, int]:
    """How many cases have which status; of one dtype if it is given."""
    counted = collections.Counter(s for by in parity.values() for d, s in by.items() if dtype in (None, d))
    return {status: counted[status] for status in STATUSES}


def read(path: pathlib.Path) -> Results:
    """The results in a file.

    Raises:
        BrokenResults: it cannot be read, or is no results file.
    """
    try:
        records = json.loads(path.read_text())
    except OSError as error:
        raise BrokenResults(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise BrokenResults(
            f"{path} is not JSON ({error}); let pytest tests/parity/test_opinfo.py write it again"
        ) from None
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise BrokenResults(
            f"{path} is no results file: expected a list of objects with the strings {', '.join(sorted(_KEYS))}, as "
            "pytest tests/parity/test_opinfo.py writes it"
        )
    if wrong := {r["status"] for r in records} - set(STATUSES):
        raise BrokenResults(f"{path} has unknown statuses {', '.join(sorted(wrong))}; known: {', '.join(STATUSES)}")
    return Results(records)


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in _KEYS):
        return False
    names = record.get("aten", [])
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def default_path() -> pathlib.Path | None:
    """``.cache/opinfo-results.json`` in the current folder or one above it, if there is one."""
    here = pathlib.Path.cwd()
    for folder in (here, *here.parents):
        if (path := folder / ".cache" / "opinfo-results.json").is_file():
            return path
    return None
