"""Which ATen op is carried out in which way, found out from the registry and torch's tables without running anything."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torchax._core_ops as core_ops
from torchax._foreach import foreach_element
from torchax._lower import decomposition, is_composite_implicit
from torchax._registry import REGISTRY
from torchax._twins import functional_twin

KINDS = {
    "lowered": "a plugin lowers it",
    "core": "torchax-core does it: storage, copies, geometry",
    "derived": "in-place, out= or foreach form of an op that runs",
    "composite": "torch takes it apart before any device sees it",
    "decomposed": "torch expresses it by other ops, traced into one program",
    "missing": "raises OperatorNotFound, or runs on CPU with torchax.config.fallback = 'cpu'",
}


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How one op is carried out.

    Attributes:
        op: qualified name of the overload.
        kind: a key of `KINDS`.
        provider: the plugin that lowers it (several: separated by commas), ``torch`` or ``torchax-core``.
        family: the module of its lowering.
        core_aten: whether torch counts it to the core ATen set.
    """

    op: str
    kind: str
    provider: str
    family: str
    core_aten: bool


def aten_ops() -> list[Any]:
    """All overloads in ``torch.ops.aten`` that a tensor program can reach, sorted by name."""
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        if namespace != "aten":
            continue
        packet_name, _, overload = rest.partition(".")
        packet = getattr(torch.ops.aten, packet_name, None)
        func = getattr(packet, overload or "default", None) if packet is not None else None
        if func is not None and "Tensor" in str(func._schema):  # the others are TorchScript's arithmetic of numbers
            found.append(func)
    return sorted(found, key=lambda func: func.name())


def classify(func: Any) -> Coverage:
    """How `func` is carried out, as `torchax._rules.make_rule` will decide."""
    name, core = func.name(), torch.Tag.core in func.tags
    if name in core_ops.RULES:
        return Coverage(name, "core", "torchax-core", "", core)
    entries = REGISTRY.lowerings(func)
    if entries:
        providers = ", ".join(dict.fromkeys(e.provider for e in entries))
        return Coverage(name, "lowered", providers, entries[0].family, core)
    if func._schema.is_mutable:
        twin = functional_twin(func)
        if twin is not None and "Tensor" in str(twin._schema) and (base := classify(twin)).kind != "missing":
            return Coverage(name, "derived", base.provider, base.family, core)
    if is_composite_implicit(func):
        return Coverage(name, "composite", "torch", "", core)
    element = foreach_element(func)
    if element is not None and (base := classify(element)).kind != "missing":
        return Coverage(name, "derived", base.provider, base.family, core)
    if decomposition(func) is not None:
        return Coverage(name, "decomposed", "torch", "", core)
    return Coverage(name, "missing", "", "", core)


def coverage() -> list[Coverage]:
    """Every ATen op."""
    return [classify(func) for func in aten_ops()]


def summary(rows: list[Coverage]) -> dict[str, Any]:
    """Counts by kind, for all of ATen and for the core ATen set, and the shares that run."""

    def count(these: list[Coverage]) -> dict[str, Any]:
        kinds = {kind: sum(row.kind == kind for row in these) for kind in KINDS}
        runs = len(these) - kinds["missing"]
        return {"ops": len(these), "runs": runs, "share": round(runs / len(these), 4) if these else 0.0, **kinds}

    return {"aten": count(rows), "core_aten": count([row for row in rows if row.core_aten])}


def find(text: str) -> list[Any]:
    """The overloads that `text` names: ``add``, ``add.Tensor``, ``aten::add.Tensor`` or ``torch.ops.aten.add.Tensor``."""
    text = text.removeprefix("torch.ops.").replace("::", ".")
    parts = text.split(".")
    namespace = (
        parts.pop(0) if len(parts) > 1 and hasattr(torch.ops, parts[0]) and parts[0] in ("aten", "prims") else "aten"
    )
    if not parts or not parts[0]:
        return []
    packet = getattr(getattr(torch.ops, namespace), parts[0], None)
    if packet is None or not hasattr(packet, "overloads"):
        return []
    if len(parts) > 1:
        return [getattr(packet, parts[1])] if parts[1] in packet.overloads() else []
    return [getattr(packet, overload) for overload in packet.overloads()]
