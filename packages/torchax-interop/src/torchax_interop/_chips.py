"""Published peaks of TPU generations: Google Cloud's documentation, "TPU architecture", the page of each version.

Per chip. They bound what a program can reach; they predict nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One TPU chip.

    Attributes:
        name: generation.
        hbm_bytes: memory.
        hbm_bandwidth: bytes a second between memory and chip.
        bf16_flops: operations a second in bfloat16.
    """

    name: str
    hbm_bytes: int
    hbm_bandwidth: float
    bf16_flops: float


_GB = 10**9
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * 2**30, 1200 * _GB, 275e12),
        Chip("v5e", 16 * 2**30, 819 * _GB, 197e12),
        Chip("v5p", 95 * 2**30, 2765 * _GB, 459e12),
        Chip("v6e", 32 * 2**30, 1600 * _GB, 918e12),
    )
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as ``v5e:2x2``.

    Raises:
        ValueError: the generation is not known.
    """
    name = str(topology).partition(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"there is no TPU topology {topology!r}: its generation is one of {', '.join(CHIPS)}, as in 'v5e:2x2'"
        )
    return CHIPS[name]
