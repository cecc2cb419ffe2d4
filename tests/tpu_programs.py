"""Programs compiled by the real TPU compiler (libtpu) on a machine without a TPU, and what they move."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GENERATIONS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def devices(topology: str = "v5e:2x2") -> np.ndarray:
    """The chips of a topology; the test is skipped where there is no compiler."""
    pytest.importorskip("libtpu")
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_LOG_DIR="disabled"
    )
    return _devices(topology)


@functools.cache
def _devices(topology: str) -> np.ndarray:
    from jax.experimental import topologies

    return np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def chip(topology: str) -> Mesh:
    """One chip of a topology."""
    return Mesh(devices(topology)[:1], ("x",))


def compile_for_tpu(function: Callable[..., Any], *shapes: Any, topology: str = "v5e:2x2") -> Any:
    """`function` of arrays of these shapes and dtypes, compiled for one chip."""
    mesh = chip(topology)
    avals = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, PartitionSpec())) for s in shapes]
    with jax.sharding.set_mesh(mesh):
        return jax.jit(function).trace(*avals).lower(lowering_platforms=("tpu",)).compile()


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_STEP = re.compile(r"\s+(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_FREE = ("parameter", "bitcast", "get-tuple-element", "tuple", "constant", "after-all")


def _bytes(shape: str, everywhere: bool = False) -> int:
    """Bytes of an array, or of a tuple of them; what lies in the vector memory counts if `everywhere`."""
    found = _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    return sum(
        _BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes, layout in found
        if everywhere or "S(" not in layout
    )


def moved(program: Any) -> int:
    """Bytes that the steps of a program read from HBM and write there, each operand and result of a step counted once.

    The compiler's own figure counts, besides, what conversions inside of a fused product would move. What is fetched for the next call
    of the program, and used by no step of this one, does not count.
    """
    text = program.as_text()
    steps = [s.groups() for line in text[text.index("\nENTRY") :].splitlines() if (s := _STEP.match(line))]
    operands = [re.findall(r"%[\w.\-]+", rest.partition("), ")[0]) for *_, rest in steps]
    used = {name for names in operands for name in names}
    held: dict[str, int] = {}
    total = 0
    for (name, shape, kind, _), read in zip(steps, operands, strict=True):
        held[name] = _bytes(shape)
        if kind.endswith("-done"):  # a transfer between HBM and the vector memory
            total += _bytes(shape, everywhere=True) if name in used else 0
        elif kind not in _FREE and not kind.endswith("-start"):
            total += held[name] + sum(held.get(operand, 0) for operand in read)
    return total
