"""Room for compiled programs: XLA's programs for CPU are mapped memory, of which Linux gives a process so many pieces.

Where no more can be had (``vm.max_map_count``) XLA's compiler ends the process. A long program whose shapes change all the
time comes there after some ten thousand signatures, so that what JAX holds is dropped before; it is compiled anew if needed.
"""

from __future__ import annotations

import itertools
import pathlib
import warnings

import jax

_EVERY = 256  # programs, of a few mappings each
_MAPPINGS = pathlib.Path("/proc/self/maps")
_LIMIT = pathlib.Path("/proc/sys/vm/max_map_count")
_programs = itertools.count(1)


def make_room() -> None:
    """Count a program that is about to be compiled; drop the compiled ones if the process is three quarters full."""
    if next(_programs) % _EVERY:
        return
    try:
        with _MAPPINGS.open("rb") as mappings:
            held = sum(1 for _ in mappings)
        limit = int(_LIMIT.read_text())
    except (OSError, ValueError):  # not Linux
        return
    if held * 4 > limit * 3:
        warnings.warn(
            f"the compiled programs of this process hold {held} of {limit} memory mappings: they are dropped and compiled "
            "anew when needed. Avoid shapes that change all the time, or raise vm.max_map_count",
            stacklevel=2,
        )
        jax.clear_caches()
