"""Operators by what people call them: ``add``, ``add.Tensor``, ``aten::add.Tensor``, ``torch.ops.aten.add.Tensor``."""

from __future__ import annotations

import difflib
from typing import Any

import torch


def names() -> list[str]:
    """Qualified names of every overload that torch knows and a tensor program can reach, sorted."""
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if "::" in name)


def find(text: str) -> list[Any]:
    """The overloads that `text` names; none if torch has no such operator. Operators of numbers are none."""
    text = text.strip().removeprefix("torch.ops.")
    if "::" in text:
        namespace, _, rest = text.partition("::")
    else:
        first, _, rest = text.partition(".")
        namespace = first if rest and _is_namespace(first) else "aten"
        rest = rest if namespace == first and rest else text
    packet_name, _, overload = rest.partition(".")
    if not packet_name.isidentifier() or not namespace.isidentifier():
        return []
    packet = getattr(getattr(torch.ops, namespace), packet_name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    chosen = [overload] if overload else packet.overloads()
    found = [getattr(packet, name) for name in chosen if name in packet.overloads()]
    return [func for func in found if of_tensors(func)]


def _is_namespace(name: str) -> bool:
    prefix = name + "::"
    return any(op.startswith(prefix) for op in torch._C._dispatch_get_all_op_names())


def of_tensors(func: Any) -> bool:
    """Whether an overload takes or gives tensors; the others are TorchScript's arithmetic of numbers."""
    return "Tensor" in str(func._schema)


def closest(text: str, n: int = 3) -> list[str]:
    """Names of operators that look most like `text`; with an overload where only that is wrong."""
    wanted = text.strip().removeprefix("torch.ops.").replace("::", ".")
    known: dict[str, str] = {}
    every = names()
    for name in every:
        namespace, _, rest = name.partition("::")
        packet = rest.split(".")[0]
        known.setdefault(f"{namespace}.{packet}", f"{namespace}::{packet}")
        if namespace == "aten":
            known.setdefault(packet, f"aten::{packet}")
    tries = [wanted, wanted.removeprefix("aten.").split(".")[0]]
    found = []
    for part in reversed(wanted.split(".")[-2:]):  # torch.add, F.relu, add.Tensr
        if part in known:
            overloads = {o.removeprefix("aten::"): o for o in every if o.split(".")[0] == known[part]}
            found += [overloads[m] for m in difflib.get_close_matches(wanted.removeprefix("aten."), overloads, n, 0.8)]
            found.append(known[part])
    found += [known[m] for t in tries for m in difflib.get_close_matches(t, known, n, 0.6)]
    return list(dict.fromkeys(found))[:n]
