"""What the TPU compiler says of a program, in a form for people and for programs."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from ._chips import Chip
from ._loops import Loops


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind.

    Attributes:
        kind: ``all-gather``, ``all-reduce``, ``reduce-scatter``, ``all-to-all``, ``collective-permute``.
        count: how many run in a step; see `AotCompiled.flops` for loops.
        bytes: size of their results on each device; of reduce-scatter, size of what is summed.
    """

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class AotCompiled:
    """A program compiled for a TPU that is not here. Bytes and operations are those of one device.

    Attributes:
        topology: as it was asked for.
        mesh: sizes of the axes.
        fits: the compiler found room for the program, and there is room for what is held besides.
        hbm_bytes: memory of a chip.
        state_bytes: parameters, buffers, the optimizer's state, and gradients that stay between calls.
        held_bytes: of the state, what the program neither reads nor overwrites but what is there while it runs: parameters that it does
            not use.
        argument_bytes: everything that the program reads: state, arguments, random state. This and all that follows is None
            where the compiler found no room.
        output_bytes: results, those that overwrite arguments included.
        alias_bytes: results that overwrite arguments.
        temporary_bytes: what the program needs in between, at different times.
        peak_bytes: the most that it holds at one time, arguments and results included.
        code_bytes: the program itself.
        flops: operations, as XLA counts them, of kernels what they declare. A loop counts with all its passes where these are a
            number (`scan_layers`, `torch.ops.higher_order.scan`), else once.
        bytes_accessed: bytes that operations read and write, counted so, too.
        collectives: what the devices send to each other.
        kernels: name of each Pallas kernel -> how often it is called.
        largest: where the compiler found no room, the largest values that the program computes, as ``"float32[8, 16] of dot_general"`` ->
            bytes, on all chips together, before the compiler divides and fuses them.
        problem: what the compiler said if it does not fit.
        advice: what would make it fit.
        compiled: JAX's compiled program (`as_text()`, `cost_analysis()`, `memory_analysis()`).
    """

    topology: str
    mesh: dict[str, int]
    chip: Chip
    fits: bool
    state_bytes: int
    held_bytes: int = 0
    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    code_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    collectives: tuple[Collective, ...] = ()
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    largest: dict[str, int] = dataclasses.field(default_factory=dict)
    problem: str | None = None
    advice: tuple[str, ...] = ()
    compiled: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def hbm_bytes(self) -> int:
        return self.chip.hbm_bytes

    @property
    def total_bytes(self) -> int | None:
        """What a device holds while the program runs; None where the compiler found no room."""
        if self.compiled is None:
            return None
        return self.held_bytes + (self.peak_bytes or 0) + (self.code_bytes or 0)

    @property
    def roofline_seconds(self) -> float | None:
        """The longer of flops / the chip's peak in bfloat16 and bytes / its bandwidth: a bound, not a prediction.

        Neither waiting for other chips nor overlap is in it; see `flops` for what is not counted.
        """
        if self.flops is None or self.bytes_accessed is None:
            return None
        return max(self.flops / self.chip.bf16_flops, self.bytes_accessed / self.chip.hbm_bandwidth)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the program, of plain Python types."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("compiled", "chip")}
        found["collectives"] = [dataclasses.asdict(c) for c in self.collectives]
        found |= {"chip": self.chip.name, "hbm_bytes": self.hbm_bytes, "total_bytes": self.total_bytes}
        return found | {"roofline_seconds": self.roofline_seconds}


def measured(
    program: jax.stages.Compiled, topology: str, chip: Chip, mesh: Mesh, state_bytes: int, held_bytes: int
) -> AotCompiled:
    """The report of a program that was compiled."""
    memory: Any = program.memory_analysis()
    cost: Any = program.cost_analysis() or {}
    loops = Loops(program.as_text() or "")
    found = AotCompiled(
        topology,
        dict(mesh.shape),
        chip,
        True,
        state_bytes,
        held_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=float(cost.get("flops", 0.0)) + loops.later.flops + flops_of_kernels(loops),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)) + loops.later.bytes,
        collectives=collectives_of(loops),
        kernels=kernels_of(loops),
        compiled=program,
    )
    excess = (found.total_bytes or 0) - chip.hbm_bytes
    if excess <= 0:
        return found
    return dataclasses.replace(
        found,
        fits=False,
        problem=f"the compiler found room for the program, but {held_bytes} bytes of state that it does not use are held while it runs; "
        f"{excess} bytes are missing",
        advice=("keep parameters that the step does not use elsewhere: on the host, or out of the model",),
    )


def refused(
    message: str, topology: str, chip: Chip, mesh: Mesh, state_bytes: int, largest: dict[str, int]
) -> AotCompiled:
    """The report of a program that the compiler found no room for."""
    return AotCompiled(
        topology,
        dict(mesh.shape),
        chip,
        False,
        state_bytes,
        largest=largest,
        problem=message.strip().splitlines()[0],
        advice=_advice(chip, mesh, state_bytes),
    )


def _advice(chip: Chip, mesh: Mesh, state_bytes: int) -> tuple[str, ...]:
    devices = math.prod(mesh.shape.values())
    share = state_bytes / chip.hbm_bytes
    if share > 1:
        least = math.ceil(share * devices)
        return (
            f"parameters and the optimizer's state alone take {share:.1f} times a chip's memory: divide them further; if all "
            f"of it were divided evenly, {least} chips would be the least",
            "or keep less: parameters in bfloat16, an optimizer with less state",
        )
    return (
        f"parameters and the optimizer's state take {share:.0%} of a chip's memory, the rest is activations: a smaller batch, or "
        "the batch over more chips",
        "or compute activations again in the backward: gradient_checkpoint, scan_layers(..., checkpoint=True)",
    )


# ---------------------------------------------------------------------- what is in the program
def largest_values(jaxpr: Any, count: int = 5) -> dict[str, int]:
    """The largest values that a jaxpr's primitives compute, those inside of loops and calls included: each shape once."""
    found: dict[str, int] = {}

    def visit(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            inner = [j for j in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(j)]
            for j in inner:
                visit(getattr(j, "jaxpr", j))
            for aval in () if inner else [v.aval for v in eqn.outvars if hasattr(v.aval, "shape")]:
                size = math.prod(aval.shape) * aval.dtype.itemsize
                found.setdefault(f"{aval.dtype}{list(aval.shape)} of {eqn.primitive.name}", size)

    visit(jaxpr)
    return dict(sorted(found.items(), key=lambda item: -item[1])[:count])


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


_COLLECTIVE = re.compile(
    r"= (?P<type>\(.*?\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SHAPE = re.compile(r"\b(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")
_DECLARED = re.compile(
    r"custom_call_target=\"tpu_custom_call\"(?:(?!backend_config=)[\s\S])*?\btorchax_flops=\"(?P<flops>\d+)\""
)
_KERNEL = re.compile(r"%(?P<name>[\w.-]+) = .*custom_call_target=\"tpu_custom_call\"")


def collectives_of(loops: Loops) -> tuple[Collective, ...]:
    """The collectives that a run of an HLO module makes, by kind."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for name, part in loops.parts.items():
        scattered = name.startswith("all-reduce-scatter")  # TPUs sum and divide in one of this name
        for line in part.splitlines():
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            kind = "reduce-scatter" if scattered and match["kind"] == "all-reduce" else match["kind"]
            sizes = [_bytes_of(s) for s in _SHAPE.finditer(match["type"])]
            # what starts one gives its operands, results and, for permutations, two counters
            size = max(sizes, default=0) if match["start"] else sum(sizes)
            channel = _CHANNEL.search(line)  # one that overlaps with computing is in several fusions
            key = kind, channel[1] if channel else f"line {len(found)}"
            found[key] = max(found.get(key, (0, 0)), (size, loops.times[name]))
    kinds = sorted({kind for kind, _ in found})
    runs = {kind: [run for (k, _), run in found.items() if k == kind] for kind in kinds}
    return tuple(
        Collective(kind, sum(n for _, n in each), sum(size * n for size, n in each)) for kind, each in runs.items()
    )


def _bytes_of(shape: re.Match[str]) -> int:
    elements = math.prod(int(n) for n in shape["shape"].split(",") if n)
    return elements if shape["bits"] is None else elements * int(shape["bits"]) // 8


def flops_of_kernels(loops: Loops) -> int:
    """Operations of the kernels that declare them beside the program, since they tell the compiler none."""
    return sum(loops.times[n] * int(m["flops"]) for n, part in loops.parts.items() for m in _DECLARED.finditer(part))


def kernels_of(loops: Loops) -> dict[str, int]:
    """The Pallas kernels of an HLO module, by name, and how often a run calls each."""
    found: dict[str, int] = {}
    for part_name, part in loops.parts.items():
        for match in filter(None, map(_KERNEL.search, part.splitlines())):
            name = re.sub(r"(\.(\d+|clone|remat\d*))+$", "", match["name"])
            found[name] = found.get(name, 0) + loops.times[part_name]
    return found


__all__ = ["AotCompiled", "Collective"]
