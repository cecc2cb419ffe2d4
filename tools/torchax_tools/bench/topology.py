"""JAX programs compiled for chips of a TPU topology, and how ours compare."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax.interop import AotCompiled
from torchax_interop._fit import collectives_of
from torchax_interop._loops import Loops

from .measure import Row

_MOVES = re.compile(
    r"= \w+\[(?P<shape>[\d,]*)\]\S* (?:transpose|copy)\([^)]*\)(?:, dimensions=\{(?P<permutation>[\d,]*)\})?"
)
_SMALL = 1024  # elements: what is copied below that costs nothing


def chips(topology: str, n: int = 1) -> Mesh:
    """The first chips of a topology along an axis, ``data``."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:n]
    return Mesh(devices, ("data",))


def compiled_for(function: Any, operands: Any, mesh: Mesh, layout: Any = None) -> jax.stages.Compiled:
    """A function of `jax.jit` on a mesh's chips, in the precision that torch asks for by default.

    Args:
        function: what `jax.jit` gave.
        operands: its arguments, a tree of arrays.
        mesh: whose chips.
        layout: how the operands lie, a prefix of their tree; None for all of them whole on every chip.
    """
    there = lambda spec, arrays: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), arrays
    )
    is_spec = lambda x: isinstance(x, PartitionSpec)
    operands = jax.tree.map(there, PartitionSpec() if layout is None else layout, operands, is_leaf=is_spec)
    with jax.default_matmul_precision("highest"):
        return function.trace(*operands).lower(lowering_platforms=("tpu",)).compile()


def compared(group: str, name: str, ours: AotCompiled, theirs: Any, against: str) -> Iterator[Row]:
    """Rows of both programs' flops, bytes, memory, transposes and copies, and what the chips send to each other, if they do."""
    cost = theirs.cost_analysis()
    text, other_text = ours.compiled.as_text() or "", theirs.as_text() or ""
    loops = Loops(other_text)
    sent = sum(c.bytes for c in ours.collectives), sum(c.bytes for c in collectives_of(loops))
    rows: dict[str, tuple[float, float]] = {
        "flops": (ours.flops or 0, cost["flops"] + loops.later.flops),  # what kernels do included
        "bytes": (ours.bytes_accessed or 0, cost["bytes accessed"] + loops.later.bytes),
        "memory": (_memory(ours.compiled), _memory(theirs)),
        "transposes, copies": (_moves(text), _moves(other_text)),
        **({"collectives' bytes": sent} if any(sent) else {}),
    }
    for what, (mine, other) in rows.items():
        yield Row(group, f"{name}: {what}", max(mine, 1) / max(other, 1), "x", against, 1.02, mine, other, counted="")


def _memory(program: Any) -> int:
    """Bytes of a chip's memory for arguments, results and temporaries."""
    m = program.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def _moves(text: str) -> int:
    numbers = lambda listed: [int(n) for n in (listed or "").split(",") if n]
    # the compiler writes transpositions that leave every dimension where it is
    moves = [m for m in _MOVES.finditer(text) if (p := numbers(m["permutation"])) != sorted(p) or not p]
    return sum(math.prod(numbers(m["shape"])) >= _SMALL for m in moves)
