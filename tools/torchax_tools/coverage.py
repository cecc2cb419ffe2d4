"""Which operator is carried out in which way, found out from the registry and torch's tables without running anything."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torchax._core_ops as core_ops
from torchax import _lookup, plugins
from torchax._foreach import foreach_element
from torchax._lower import decomposition, is_composite_implicit
from torchax._registry import REGISTRY, Lowering
from torchax._twins import functional_twin

from .families import family_of
from .parity import Parity, Results

KINDS = {
    "lowered": "a plugin lowers it",
    "core": "torchax-core does it: storage, copies, geometry",
    "derived": "in-place, out= or foreach form of an op that runs",
    "composite": "torch takes it apart before any device sees it",
    "decomposed": "torch expresses it by other ops, traced into one program",
    "missing": "raises OperatorNotFound, or runs on CPU with torchax.config.fallback = 'cpu'",
}
SETS = {
    "aten": "ATen",
    "core_aten": "core ATen",
    "prims": "prims",
    "torchvision": "torchvision",
    "custom": "other operators that a plugin lowers",
}


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How one op is carried out.

    Attributes:
        op: qualified name of the overload.
        kind: a key of `KINDS`.
        by: how it is lowered: ``function``, ``table``, ``view``, ``whole``, ``stateful``, ``dynamic``; for a derived one, of what.
        provider: the plugin that is asked first (``torch`` or ``torchax-core`` where no plugin is asked).
        version: the provider's version.
        platforms: platforms on which the provider serves it; empty means every one.
        family: the module of its lowering, or what its name suggests.
        core_aten: whether torch counts it to the core ATen set.
        alternatives: the lowerings that are asked, highest priority first, if there are several or conditions.
        parity: from the results of tests, by form and dtype.
    """

    op: str
    kind: str
    by: str
    provider: str
    version: str
    platforms: tuple[str, ...]
    family: str
    core_aten: bool
    alternatives: tuple[dict[str, Any], ...] = ()
    parity: Parity = dataclasses.field(default_factory=dict)

    @property
    def set(self) -> str:
        """The set of operators that it belongs to: a key of `SETS` (``aten`` also for core ATen)."""
        namespace = self.op.split("::")[0]
        return namespace if namespace in ("aten", "prims", "torchvision") else "custom"


def all_ops() -> list[Any]:
    """The overloads of ATen, prims, torchvision (where it is imported), and all others that a plugin lowers, by name."""
    namespaces = ("aten", "prims", "torchvision")
    names = [n for n in _lookup.names() if n.split("::")[0] in namespaces]
    names += [n for n in REGISTRY.ops() if n.split("::")[0] not in namespaces]
    found = {func.name(): func for name in names for func in _lookup.find(name) if func.name() == name}
    return [found[name] for name in sorted(found)]


@functools.cache
def version_of(provider: str) -> str:
    """The version of a plugin, of torch or of torchax-core; empty if it does not say."""
    if provider == "torch":
        return torch.__version__
    if provider == "torchax-core":
        import torchax

        return torchax.__version__
    return next((str(s.info.get("version", "")) for s in plugins.status() if s.name == provider), "")


def _asked(func: Any, platform: str | None, dtype: torch.dtype | None) -> list[Lowering]:
    """The lowerings that a call on `platform` with `dtype` may be served by."""
    return [
        entry
        for entry in REGISTRY.lowerings(func)
        if (platform is None or not entry.platforms or platform in entry.platforms)
        and (dtype is None or not entry.dtypes or dtype in entry.dtypes)
    ]


def _by(entry: Lowering) -> str:
    if entry.whole:
        return "whole"
    if entry.kind != "functional":
        return entry.kind
    return "table" if entry.table else "function"


def alternative(entry: Lowering) -> dict[str, Any]:
    """A lowering as an entry of `Coverage.alternatives`."""
    return {
        "plugin": entry.provider,
        "function": f"{getattr(entry.fn, '__module__', '?')}.{getattr(entry.fn, '__qualname__', '?')}",
        "priority": entry.priority,
        "condition": entry.conditions,
    }


def classify(func: Any, platform: str | None = None, dtype: torch.dtype | None = None) -> Coverage:
    """How `func` is carried out, as `torchax._rules.make_rule` will decide."""
    name, core = func.name(), torch.Tag.core in func.tags

    def row(kind: str, by: str, provider: str, family: str = "", **more: Any) -> Coverage:
        return Coverage(name, kind, by, provider, version_of(provider), more.pop("platforms", ()),
                        family or family_of(name), core, **more)  # fmt: skip

    if name in core_ops.RULES:
        return row("core", "", "torchax-core")
    entries = _asked(func, platform, dtype)
    if entries:
        first = entries[0]
        several = len(entries) > 1 or first.conditions != "always"
        listed = tuple(alternative(entry) for entry in entries) if several else ()
        everywhere = any(not entry.platforms for entry in entries)
        served = () if everywhere else tuple(dict.fromkeys(p for e in entries for p in e.platforms))
        family = next((e.family for e in entries if e.provider == "aten"), first.family)
        return row("lowered", _by(first), first.provider, family, alternatives=listed, platforms=served)
    if func._schema.is_mutable:
        twin = functional_twin(func)
        if twin is not None and "Tensor" in str(twin._schema):
            base = classify(twin, platform, dtype)
            if base.kind != "missing":
                return row("derived", twin.name(), base.provider, base.family, platforms=base.platforms)
    if is_composite_implicit(func):
        return row("composite", "", "torch")
    element = foreach_element(func)
    if element is not None:
        base = classify(element, platform, dtype)
        if base.kind != "missing":
            return row("derived", element.name(), base.provider, "foreach", platforms=base.platforms)
    if decomposition(func) is not None:
        return row("decomposed", "", "torch")
    return row("missing", "", "")


def coverage(
    results: Results | None = None, platform: str | None = None, dtype: torch.dtype | None = None
) -> list[Coverage]:
    """Every operator; the parity of those of ATen is looked up in `results`."""
    rows = [classify(func, platform, dtype) for func in all_ops()]
    if results is None:
        return rows
    return [dataclasses.replace(r, parity=results.of(r.op)) if r.op.startswith("aten::") else r for r in rows]


def summary(rows: list[Coverage]) -> dict[str, Any]:
    """Counts by kind and the shares that run, for each set of operators that is there."""

    def count(these: list[Coverage]) -> dict[str, Any]:
        kinds = {kind: sum(row.kind == kind for row in these) for kind in KINDS}
        runs = len(these) - kinds["missing"]
        return {"ops": len(these), "runs": runs, "share": round(runs / len(these), 4) if these else 0.0, **kinds}

    sets = {name: [row for row in rows if row.set == name] for name in SETS}
    sets["core_aten"] = [row for row in rows if row.core_aten and row.set == "aten"]
    return {name: count(these) for name, these in sets.items() if these or name in ("aten", "core_aten")}
