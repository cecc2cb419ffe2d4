"""Block sizes by TPU generation."""

from __future__ import annotations

import dataclasses

import jax

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

    def within(self, length: int, keys: int, features: int) -> Blocks:
        """No larger than the call's lengths need; halved where heads are wide, since a block's bytes grow with them."""
        limit = 512 if features <= 128 else 256

        def fit(size: int, length: int) -> int:
            return min(size, limit, round_up(length, LANES))

        return Blocks(
            fit(self.queries, length),
            fit(self.keys, keys),
            fit(self.backward_queries, length),
            fit(self.backward_keys, keys),
        )


# By the beginning of `jax.Device.device_kind`. Chosen so that the compiler's default share of the vector memory holds them.
ATTENTION = {
    "TPU v4": Blocks(512, 512, 256, 512),
    "TPU v5 lite": Blocks(512, 512, 256, 512),
    "TPU v5": Blocks(512, 512, 512, 512),
    "TPU v6": Blocks(512, 512, 512, 512),
    "TPU7": Blocks(512, 512, 512, 512),
}
_UNKNOWN = Blocks(256, 256, 256, 256)


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


def attention_blocks(length: int, keys: int, features: int, kind: str | None = None) -> Blocks:
    """The blocks of a call.

    Args:
        length: number of queries.
        keys: number of keys.
        features: width of a head.
        kind: the TPU's `device_kind`; None for the one that is traced for.
    """
    kind = device_kind() if kind is None else kind
    known = next((blocks for start, blocks in ATTENTION.items() if kind.startswith(start)), _UNKNOWN)
    return known.within(length, keys, features)
