"""The functional op that an in-place or ``out=`` op does the work of."""

from __future__ import annotations

from typing import Any

import torch


def functional_twin(func: Any) -> Any | None:
    """The overload without side effects whose results are what `func` writes, or None where ATen has none."""
    namespace, packet = func._schema.name.split("::")
    ops = getattr(torch.ops, namespace)
    has_out = any(a.is_out for a in func._schema.arguments)
    if has_out:
        return _by_arguments(getattr(ops, packet), func)
    bases = [packet[:-1]] if packet.endswith("_") and not packet.endswith("__") else []
    if packet.startswith("__i") and packet.endswith("__"):  # __ilshift__ -> __lshift__
        bases.append("__" + packet[3:])
    bases += [f"{base}_functional" for base in (*bases, packet)]
    for base in bases:
        found = getattr(ops, base, None)
        if found is None:
            continue
        twin = _by_arguments(found, func)
        if twin is not None:
            return twin
        overload = func._schema.overload_name or "default"
        if overload in found.overloads() and _is_functional(getattr(found, overload)):
            return getattr(found, overload)
    return None


def _is_functional(overload: Any) -> bool:
    """Whether it writes nothing. TorchScript's functions of numbers (``aten::ldexp``) share names with ops; they are none."""
    schema = overload._schema
    return not schema.is_mutable and any("Tensor" in str(a.type) for a in (*schema.arguments, *schema.returns))


def _makes_results(overload: Any) -> bool:
    """Whether it makes its results. Running statistics are written by either form of an op."""
    schema = overload._schema
    return not any(a.is_out for a in schema.arguments) and any("Tensor" in str(r.type) for r in schema.returns)


def _by_arguments(packet: Any, func: Any) -> Any | None:
    want = [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]
    own = func._schema.overload_name or "default"
    has_out = any(a.is_out for a in func._schema.arguments)
    for overload in sorted(packet.overloads(), key=lambda name: name != own):  # the one of the same name first
        candidate = getattr(packet, overload)
        if not (_makes_results(candidate) if has_out else _is_functional(candidate)):
            continue
        have = [(a.name, str(a.type)) for a in candidate._schema.arguments]
        if have == want or [a for a in have if a[0] not in _PLACEMENT] == want:
            return candidate
    return None


_PLACEMENT = {"dtype", "layout", "device", "pin_memory", "memory_format"}
