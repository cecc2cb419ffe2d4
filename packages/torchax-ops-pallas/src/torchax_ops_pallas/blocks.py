"""Block sizes of a call: those that `autotune` is trying, the user's own, or those of the table for the TPU generation."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from . import user_table

LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of a block, each a multiple of `LANES`.

    Attributes:
        queries: queries per block, forward.
        keys: keys per block, forward.
        backward_queries: queries per block, backward.
        backward_keys: keys per block, backward.
    """

    queries: int
    keys: int
    backward_queries: int
    backward_keys: int

    def halved(self, features: int) -> Blocks:
        """At most 256 where heads are wide, since a block's bytes grow with them."""
        return self if features <= 128 else Blocks(*(min(256, n) for n in dataclasses.astuple(self)))

    def within(self, length: int, keys: int) -> Blocks:
        """No larger than the call's lengths need."""
        sizes = zip(dataclasses.astuple(self), (length, keys, length, keys), strict=True)
        return Blocks(*(min(n, round_up(size, LANES)) for n, size in sizes))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tile of a product ``[rows, inner] @ [inner, columns]``, each a multiple of `LANES`."""

    rows: int
    inner: int
    columns: int

    def within(self, *sizes: int) -> Tiles:
        """No larger than the call's sizes need."""
        return Tiles(*(min(n, round_up(size, LANES)) for n, size in zip(dataclasses.astuple(self), sizes, strict=True)))


# By the beginning of `jax.Device.device_kind`. Chosen so that the compiler's default share of the vector memory holds them.
ATTENTION = {
    "TPU v4": Blocks(512, 512, 256, 512),
    "TPU v5 lite": Blocks(512, 512, 256, 512),
    "TPU v5": Blocks(512, 512, 512, 512),
    "TPU v6": Blocks(512, 512, 512, 512),
    "TPU7": Blocks(512, 512, 512, 512),
    "": Blocks(256, 256, 256, 256),
}
_MEDIUM = Tiles(512, 512, 512)
_WIDE, _WIDEST = Tiles(512, 1024, 1024), Tiles(1024, 1024, 1024)
# By kernel and bytes of an element of the operands, then as above. `grouped_outer` sums over the rows.
PRODUCTS = {
    ("grouped_matmul", 2): {"TPU v4": _WIDE, "TPU v5": _WIDE, "TPU v6": _WIDEST, "": _MEDIUM},
    ("grouped_matmul", 4): {"": _MEDIUM},
    ("grouped_outer", 2): {"TPU v4": _WIDE, "TPU v5": _WIDE, "TPU v6": _WIDEST, "": _MEDIUM},
    ("grouped_outer", 4): {"": _MEDIUM},
}
_trying: contextvars.ContextVar[tuple[str, Any] | None] = contextvars.ContextVar("blocks", default=None)


@contextlib.contextmanager
def trying(kernel: str, blocks: Any) -> Iterator[None]:
    """Within, calls of `kernel` are traced with `blocks`, whatever the tables say."""
    token = _trying.set((kernel, blocks))
    try:
        yield
    finally:
        _trying.reset(token)


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below `n`."""
    return -(-n // multiple) * multiple


def device_kind() -> str:
    """The TPU that is traced for: the mesh's in scope, else this machine's, else nothing."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    first = jax.devices()[0]
    return first.device_kind if first.platform == "tpu" else ""


def _own(kernel: str, sizes: tuple[int, ...], dtype: str, kind: str, shape: type) -> Any:
    """What is being tried, or what the user's table says; None if neither says anything."""
    tried = _trying.get()
    if tried is not None and tried[0] == kernel:
        return tried[1]
    found = user_table.find(kind, kernel, sizes, dtype) if kind else None
    names = {field.name for field in dataclasses.fields(shape)}
    return shape(**found) if found is not None and found.keys() == names else None  # else: of another version


def _of_generation(table: dict[str, Any], kind: str) -> Any:
    return next(blocks for start, blocks in table.items() if kind.startswith(start))


def attention_blocks(length: int, keys: int, features: int, kind: str | None = None, own: bool = True) -> Blocks:
    """The blocks of a call.

    Args:
        length: number of queries.
        keys: number of keys.
        features: width of a head.
        kind: the TPU's `device_kind`; None for the one that is traced for.
        own: what is being tried and the user's table go first.
    """
    sizes, kind = (length, keys, features), device_kind() if kind is None else kind
    found = _own("attention", sizes, "any", kind, Blocks) if own else None
    return (found or _of_generation(ATTENTION, kind).halved(features)).within(length, keys)


def product_tiles(kernel: str, sizes: tuple[int, ...], dtype: Any, kind: str | None = None, own: bool = True) -> Tiles:
    """The tile of a kernel for products.

    Args:
        kernel: a kernel of `PRODUCTS`.
        sizes: rows, columns of the left operand, columns of the right one.
        dtype: of the operands.
        kind: the TPU's `device_kind`; None for the one that is traced for.
        own: what is being tried and the user's table go first.
    """
    dtype, kind = jnp.dtype(dtype), device_kind() if kind is None else kind
    found = _own(kernel, sizes, dtype.name, kind, Tiles) if own else None
    return (found or _of_generation(PRODUCTS[kernel, dtype.itemsize], kind)).within(*sizes)
