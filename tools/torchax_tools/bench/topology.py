"""JAX programs compiled for one chip of a TPU topology, and how ours compare."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax.interop import AotCompiled

from .measure import Row
from .steps import work

_MOVES = re.compile(r"= \w+\[(?P<shape>[\d,]*)\]\S* (?:transpose|copy)\(")
_SMALL = 1024  # elements: what is copied below that costs nothing


def compiled_for(function: Any, operands: Any, topology: str) -> jax.stages.Compiled:
    """A function of `jax.jit` on the topology's first chip, in the precision that torch asks for by default."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = NamedSharding(Mesh([device], ("data",)), PartitionSpec())
    there = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    with jax.default_matmul_precision("highest"):
        return function.trace(*jax.tree.map(there, operands)).lower(lowering_platforms=("tpu",)).compile()


def compared(group: str, name: str, ours: AotCompiled, theirs: Any, against: str) -> Iterator[Row]:
    """Rows of both programs' flops, bytes, temporaries, transposes and copies, collectives."""
    done = (ours.flops or 0, ours.bytes_accessed or 0, ours.temporary_bytes or 0)  # what kernels do included
    for what, mine, other in zip(("flops", "bytes", "temporaries"), done, work(theirs), strict=True):
        yield Row(group, f"{name}: {what}", max(mine, 1) / max(other, 1), "x", against, 1.02, mine, other, counted="")
    mine, other = (_moves(program.as_text() or "") for program in (ours.compiled, theirs))
    title = f"{name}: transposes, copies"
    yield Row(group, title, max(mine, 1) / max(other, 1), "x", against, 1.02, mine, other, counted="")


def _moves(text: str) -> int:
    sizes = (math.prod(int(n) for n in m["shape"].split(",") if n) for m in _MOVES.finditer(text))
    return sum(size >= _SMALL for size in sizes)
