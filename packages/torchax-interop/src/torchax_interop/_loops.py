"""How often the parts of a compiled program run: XLA's cost analysis, and whoever looks for an instruction, see a loop's body once."""

from __future__ import annotations

import math
import re
import warnings
from typing import NamedTuple

import jax

# the analysis behind `jax.stages.Compiled.cost_analysis`, for a part of a program
from jax._src.lib import _jax, hlo  # pyright: ignore[reportAttributeAccessIssue]

_BEGIN = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[^\s(]+) \(", re.MULTILINE)
_WHILE = re.compile(r" while\([^\n]*?condition=%(?P<condition>[\w.-]+), body=%(?P<body>[\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|(?:true|false)_computation)=%([\w.-]+)|branch_computations=\{([^}]*)\}")
_TYPED = re.compile(r"%(?P<name>[\w.-]+) = (?P<kind>[a-z]+)\d*\[")
_COMPARED = re.compile(r" compare\(%(?P<operand>[\w.-]+)")
_ROOT = re.compile(r"ROOT %\S+ = \(.*\) tuple\(([^)]*)\)")
_BOUND = re.compile(r"= [su](?:32|64)\[\]\S* constant\((\d+)\)")


class Work(NamedTuple):
    """Operations, and bytes that they read and write."""

    flops: float = 0.0
    bytes: float = 0.0


class Loops:
    """The computations of an HLO module, and how often a run of it runs each.

    A loop counts from zero, in steps that its body adds, to the number that its condition compares with, as those of
    `jax.lax.scan` do, and those that XLA makes of products with gathered operands. One that ends by other values counts once.

    Args:
        text: of the module.

    Attributes:
        parts: the text of each computation, by name, those that are called before those that call them.
        times: how often each runs.
        later: what the passes after the first of all loops add to XLA's analysis of the whole.
    """

    def __init__(self, text: str):
        begins = list(_BEGIN.finditer(text))
        ends = [b.start() for b in begins[1:]] + [len(text)]
        self.parts = {b["name"]: text[b.start() : end] for b, end in zip(begins, ends, strict=True)}
        self.times = dict.fromkeys(self.parts, 1)
        self.later = Work()
        if " while(" in text:  # of the rest, programs with many kernels are tens of megabytes
            self._text = text.partition("\n")[2]  # without what its first line says of the whole
            self._count(next((b["name"] for b in begins if b["entry"]), ""))

    def _count(self, entry: str) -> None:
        loops = {
            name: [(w["body"], self._passes(w["condition"], w["body"])) for w in _WHILE.finditer(part)]
            for name, part in self.parts.items()
        }
        calls = {
            name: [
                called for one, several in _CALLED.findall(part) for called in re.findall(r"[\w.-]+", one or several)
            ]
            for name, part in self.parts.items()
        }
        times = dict.fromkeys(self.parts, 0) | {entry: 1}
        for name in reversed(self.parts):
            for called, passes in [*loops[name], *((c, 1) for c in calls[name])]:
                times[called] = times.get(called, 0) + passes * times[name]
        self.times.update({name: n for name, n in times.items() if n})
        bodies = {body: self._analysed(body) for inside in loops.values() for body, _ in inside}
        for name, inside in loops.items():
            for body, passes in inside:
                # all runs but one for each time that this loop is there: XLA sees a body that is inside of another once, too
                again = self.times[name] * passes - 1
                parts = [bodies[body], *(Work(-w.flops, -w.bytes) for w in (bodies[inner] for inner, _ in loops[body]))]
                flops, size = (sum(part[i] for part in parts) for i in (0, 1))
                self.later = Work(self.later.flops + again * flops, self.later.bytes + again * size)

    def _passes(self, condition: str, body: str) -> int:
        text = self.parts.get(condition, "")
        kinds = {t["name"]: t["kind"] for t in _TYPED.finditer(text)}
        compared = [c["operand"] for c in _COMPARED.finditer(text)]
        bound = max((int(n) for n in _BOUND.findall(text)), default=0)
        if not bound or any(kinds.get(name) not in ("s", "u") for name in compared):
            return 1
        return math.ceil(bound / (self._step(text, compared[0], body) if len(compared) == 1 else 1))

    def _step(self, condition: str, counter: str, body: str) -> int:
        """What a pass adds to the counter; 1 if it cannot be read off, as of counters that are two words."""
        text = self.parts.get(body, "")
        index = re.search(rf"%{re.escape(counter)} = \S+ get-tuple-element\([^)]*\), index=(\d+)", condition)
        root = _ROOT.search(text)
        if index is None or root is None:
            return 1
        new = re.findall(r"%([^\s,]+)", root[1])[int(index[1])]
        added = re.search(rf"%{re.escape(new)} = \S+ add\(%([^\s,]+), %([^\s,)]+)\)", text)
        for name in added.groups() if added else ():
            if constant := re.search(rf"%{re.escape(name)} = \S+ constant\((\d+)\)", text):
                return int(constant[1]) or 1
        return 1

    def _analysed(self, name: str) -> Work:
        """XLA's analysis of a computation, loops in it counted once."""
        text = self._text.replace("\nENTRY %", "\n%").replace(f"\n%{name} (", f"\nENTRY %{name} (", 1)
        try:
            module = hlo.hlo_module_from_text(f"HloModule part\n{text}")
        except RuntimeError as error:  # an instruction of a compiler of another version, which JAX cannot read
            warnings.warn(f"the passes of a loop count once, since JAX cannot read it: {error}", stacklevel=2)
            return Work()
        cost = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
        return Work(cost.get("flops", 0.0), cost.get("bytes accessed", 0.0))
