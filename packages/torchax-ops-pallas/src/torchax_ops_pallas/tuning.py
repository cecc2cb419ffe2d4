"""Block sizes found by timing: `autotune` tries those that the compiler accepts on the TPU of this machine, and keeps the best.

What it finds goes into the user's table (`user_table`), which calls of the same sizes, each rounded up to a power of two, then ask first.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax.errors import TorchaxError
from torchax.ops import REGISTRY

from . import user_table
from .blocks import LANES, Blocks, Tiles, attention_blocks, product_tiles, round_up, trying

DTYPES = ("bfloat16", "float32")
_GROUPS, _HEADS = 8, 8
Timer = Callable[[Callable[..., Any], Sequence[jax.Array]], float]


class NoTPU(TorchaxError, RuntimeError):
    """Kernels are timed on a TPU, and this machine has none."""


class Kernel(NamedTuple):
    """What can be tuned.

    Attributes:
        sizes: names of the sizes that a call is looked up by.
        by_dtype: the look-up knows the dtype, too.
        first: the block sizes of the table for these sizes, dtype and `device_kind`.
        rounds: each gives the candidates of a round from the best of the one before and the sizes.
        programs: what is compiled for sizes and a dtype, with the shapes of its operands; the first is timed, all must compile.
    """

    sizes: tuple[str, ...]
    by_dtype: bool
    first: Callable[[tuple[int, ...], str, str], Any]
    rounds: tuple[Callable[[Any, tuple[int, ...]], Iterable[Any]], ...]
    programs: Callable[[tuple[int, ...], Any, bool], Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate: the seconds that a call takes, or, in words of the compiler, why there is no such program."""

    blocks: Any
    seconds: float | None
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What `autotune` found.

    Attributes:
        kernel: its name.
        kind: `device_kind` of the TPU.
        sizes: of the call, as given.
        dtype: of the operands.
        trials: every candidate, in the order of trying; the first is what the table of the package says.
        best: the fastest.
        path: the file that it was written into, or None.
    """

    kernel: str
    kind: str
    sizes: tuple[int, ...]
    dtype: str
    trials: tuple[Trial, ...]
    best: Trial
    path: Any = None


def autotune(
    kernel: str,
    sizes: Sequence[int],
    dtype: str = "bfloat16",
    *,
    device: Any = None,
    timer: Timer | None = None,
    save: bool = True,
    report: Callable[[Trial], None] = lambda trial: None,
) -> Tuned:
    """Time a kernel with every block size that the compiler accepts; the best is used from then on.

    Args:
        kernel: a key of `KERNELS`.
        sizes: of a call, in the order of ``KERNELS[kernel].sizes``.
        dtype: of the operands, ``"bfloat16"`` or ``"float32"``.
        device: what to compile for; None for the first TPU of this machine. On another platform kernels are interpreted.
        timer: what times a compiled program, in seconds, given its operands; None runs it.
        save: write the best into the user's table.
        report: called with each trial.

    Returns:
        All trials and the best.

    Raises:
        NoTPU: no device is given, and this machine has no TPU.
        ValueError: there is no such kernel, or sizes or dtype are none of its own; or the user's table is broken.
        RuntimeError: no candidate compiles; the message has the compiler's words on the first.
        OSError: the table cannot be written.
    """
    tunable, sizes = _checked(kernel, tuple(sizes), dtype)
    device = _present_tpu() if device is None else device
    timer = _timed if timer is None else timer
    first = tunable.first(sizes, dtype, device.device_kind)
    trials: dict[Any, Trial] = {}
    best: Trial | None = None
    for candidates in tunable.rounds:
        base = first if best is None else best.blocks
        for blocks in (base, *candidates(base, sizes)):
            if blocks in trials:
                continue
            trials[blocks] = trial = _try(kernel, tunable, blocks, sizes, dtype, device, timer)
            report(trial)
            if trial.seconds is not None and (best is None or trial.seconds < (best.seconds or 0.0)):
                best = trial
    if best is None:
        raise RuntimeError(f"the compiler refuses every candidate of {kernel} {sizes}: {trials[first].refusal}")
    path = None
    if save:
        found = dataclasses.asdict(best.blocks)
        looked_up = dtype if tunable.by_dtype else "any"
        path = user_table.save(device.device_kind, kernel, sizes, looked_up, found, best.seconds or 0.0)
        REGISTRY.changed()
    return Tuned(kernel, device.device_kind, sizes, dtype, tuple(trials.values()), best, path)


def _checked(kernel: str, sizes: tuple[int, ...], dtype: str) -> tuple[Kernel, tuple[int, ...]]:
    tunable = KERNELS.get(kernel)
    if tunable is None:
        raise ValueError(f"there is no kernel {kernel!r} to tune; there are {', '.join(KERNELS)}")
    if len(sizes) != len(tunable.sizes) or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(f"{kernel} is tuned for positive sizes {', '.join(tunable.sizes)}; got {sizes}")
    if dtype not in DTYPES:
        raise ValueError(f"kernels are tuned for {' or '.join(DTYPES)}; got {dtype!r}")
    return tunable, sizes


def _present_tpu() -> Any:
    device = jax.devices()[0]
    if device.platform != "tpu":
        raise NoTPU(f"block sizes are found by timing kernels on a TPU; JAX has {device.device_kind!r} on this machine")
    return device


def _try(kernel: str, tunable: Kernel, blocks: Any, sizes: Any, dtype: str, device: Any, timer: Timer) -> Trial:
    interpret = device.platform != "tpu"
    timed: Any = None
    try:
        with trying(kernel, blocks):
            for function, shapes in tunable.programs(sizes, jnp.dtype(dtype), interpret):
                compiled = _compile(function, shapes, device)
                timed = (compiled, shapes) if timed is None else timed
    except Exception as error:  # the compiler has no class of its own for what it refuses
        return Trial(blocks, None, _in_short(error))
    compiled, shapes = timed
    return Trial(blocks, timer(compiled, [_operand(s, i, device) for i, s in enumerate(shapes)]))


def _in_short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _compile(function: Callable[..., Any], shapes: Sequence[Any], device: Any) -> Any:
    mesh = Mesh([device], ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    avals = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole) for s in shapes]
    with jax.sharding.set_mesh(mesh), jax.default_matmul_precision("highest"):  # as torch asks for float32
        return jax.jit(function).trace(*avals).lower(lowering_platforms=(device.platform,)).compile()


def _operand(shape: Any, i: int, device: Any) -> Any:
    """Numbers of a shape and dtype; the shape itself where the device is not here."""
    if device not in jax.devices():
        return shape
    return jax.device_put(jax.random.normal(jax.random.key(i), shape.shape, jnp.float32).astype(shape.dtype), device)


def _timed(compiled: Callable[..., Any], operands: Sequence[jax.Array]) -> float:
    """Seconds of a call, the lower quartile of several runs of several calls."""
    jax.block_until_ready(compiled(*operands))
    started = time.perf_counter()
    jax.block_until_ready(compiled(*operands))
    calls = max(1, min(100, int(0.02 / max(time.perf_counter() - started, 1e-6))))
    found = []
    for _ in range(8):
        started = time.perf_counter()
        for _ in range(calls):
            out = compiled(*operands)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - started) / calls)
    return statistics.quantiles(found, n=4)[0]


# Kernels -----------------------------------------------------------------------------------------------------------


def _reaching(size: int, *choices: int) -> list[int]:
    """The choices that a size has use for: none beyond the first that holds it."""
    most = round_up(size, LANES)
    return sorted({min(n, most) for n in choices})


def _forward_blocks(best: Blocks, sizes: tuple[int, ...]) -> Iterator[Blocks]:
    for q, k in itertools.product(*(_reaching(n, 256, 512, 1024, 2048) for n in sizes[:2])):
        yield dataclasses.replace(best, queries=q, keys=k)


def _backward_blocks(best: Blocks, sizes: tuple[int, ...]) -> Iterator[Blocks]:
    for q, k in itertools.product(*(_reaching(n, 256, 512, 1024) for n in sizes[:2])):
        yield dataclasses.replace(best, backward_queries=q, backward_keys=k)


def _attention(sizes: tuple[int, ...], dtype: Any, interpret: bool) -> Iterator[Any]:
    from .attention import attention

    length, keys, features = sizes
    shapes = [jax.ShapeDtypeStruct((1, _HEADS, n, features), dtype) for n in (length, keys, keys, length)]

    def both_ways(query: Any, key: Any, value: Any, grad: Any, *mask: Any) -> Any:
        attend = lambda *qkv: attention(*qkv, *mask, causal=not mask, scale=0.1, interpret=interpret)
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(grad)

    yield both_ways, tuple(shapes)
    yield both_ways, (*shapes, jax.ShapeDtypeStruct((length, keys), jnp.bool_))  # the kernel for mask tensors


def _tiles(_best: Tiles, sizes: tuple[int, ...]) -> Iterator[Tiles]:
    for tile in itertools.product(*(_reaching(n, 128, 256, 512, 1024, 2048)[-3:] for n in sizes)):
        yield Tiles(*tile)


def _ends(rows: int) -> jax.Array:
    return jnp.asarray([rows * (i + 1) // _GROUPS for i in range(_GROUPS)], jnp.int32)


def _grouped_matmul(sizes: tuple[int, ...], dtype: Any, interpret: bool) -> Iterator[Any]:
    from .grouped import grouped_matmul

    rows, inner, columns = sizes
    shapes = ((rows, columns), (_GROUPS, columns, inner), (rows, inner))

    def gradient_of_rows(x: Any, matrices: Any, grad: Any) -> Any:
        return jax.vjp(lambda x: grouped_matmul(x, matrices, _ends(rows), interpret), x)[1](grad)

    yield gradient_of_rows, tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)


def _grouped_outer(sizes: tuple[int, ...], dtype: Any, interpret: bool) -> Iterator[Any]:
    from .grouped import grouped_outer

    rows, inner, columns = sizes
    shapes = tuple(jax.ShapeDtypeStruct(s, dtype) for s in ((rows, inner), (rows, columns)))
    yield lambda x, y: grouped_outer(x, y, _ends(rows), interpret), shapes


def _first_tiles(kernel: str) -> Callable[[tuple[int, ...], str, str], Tiles]:
    return lambda sizes, dtype, kind: product_tiles(kernel, sizes, dtype, kind, own=False)


_OF_PRODUCTS = ("rows", "inner", "columns")
KERNELS = {
    "attention": Kernel(
        ("length", "keys", "features"),
        False,
        lambda sizes, dtype, kind: attention_blocks(sizes[0], sizes[1], sizes[2], kind, own=False),
        (_forward_blocks, _backward_blocks),
        _attention,
    ),
    "grouped_matmul": Kernel(_OF_PRODUCTS, True, _first_tiles("grouped_matmul"), (_tiles,), _grouped_matmul),
    "grouped_outer": Kernel(_OF_PRODUCTS, True, _first_tiles("grouped_outer"), (_tiles,), _grouped_outer),
}
