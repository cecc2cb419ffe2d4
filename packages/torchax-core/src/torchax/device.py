"""The device module: what PyTorch users find as ``torch.jax``, like ``torch.cuda``."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import jax
import torch

from . import convert, random
from ._checks import settle

__all__ = [
    "amp", "current_device", "device", "device_count", "empty_cache", "get_amp_supported_dtype", "get_rng_state", "get_rng_state_all", "initial_seed", "is_available",
    "is_initialized", "manual_seed", "manual_seed_all", "max_memory_allocated", "mem_get_info", "memory_allocated", "memory_stats",
    "seed", "seed_all", "set_device", "set_rng_state", "set_rng_state_all", "synchronize",
]  # fmt: skip


_initialized = True  # torch.utils.checkpoint saves and restores the state of devices that are


class _Current(threading.local):
    index = 0


_current = _Current()


def is_available() -> bool:
    """Whether JAX has a device (its CPU counts)."""
    try:
        return bool(jax.devices())
    except RuntimeError:
        return False


def is_initialized() -> bool:
    """Always: JAX initialises itself on first use."""
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    """Number of JAX devices of the default platform that this process drives; none where JAX cannot start."""
    try:
        return len(jax.local_devices())
    except RuntimeError:
        return 0


def current_device() -> int:
    """Index of the device that ``device="jax"`` means in this thread."""
    return _current.index


def with_index(device: torch.device) -> torch.device:
    """`device`, with the index of the current one where it is ``"jax"`` without an index."""
    return torch.device("jax", _current.index) if device.type == "jax" and device.index is None else device


def set_device(device: Any) -> None:
    """Make a device the current one of this thread, which ``"jax"`` means: an index, ``"jax:1"`` or a `torch.device`."""
    index = _index(device)
    convert.jax_device(index)
    if index:
        from ._accelerator import follow_current_device

        follow_current_device()
    _current.index = index


class device:  # the name torch.cuda has
    """Context manager: within, `device` is the current device of this thread."""

    def __init__(self, device: Any):
        self.index, self._previous = _index(device), 0

    def __enter__(self) -> None:
        self._previous = _current.index
        set_device(self.index)

    def __exit__(self, *exc: object) -> None:
        _current.index = self._previous


def synchronize(device: Any = None) -> None:
    """Wait until the device has done all that was queued.

    Raises:
        Exception: what an op of this thread found wrong with values, an index out of range say.
    """
    target = convert.jax_device(_index(device))
    jax.device_put(0, target).block_until_ready()
    jax.effects_barrier()
    for array in jax.live_arrays():
        if not array.is_deleted() and target in array.devices():
            array.block_until_ready()
    settle()


def memory_stats(device: Any = None) -> dict[str, Any]:
    """What JAX tells of the device's memory, in bytes (``bytes_in_use``, ``bytes_limit``, ...); on CPU the live arrays."""
    target = convert.jax_device(_index(device))
    stats = target.memory_stats()
    if stats:
        return dict(stats)
    live = [a for a in jax.live_arrays() if not a.is_deleted() and target in a.devices()]
    return {"bytes_in_use": sum(a.nbytes for a in live), "num_allocs": len(live)}


def memory_allocated(device: Any = None) -> int:
    """Bytes in use on the device."""
    return int(memory_stats(device).get("bytes_in_use", 0))


def max_memory_allocated(device: Any = None) -> int:
    """Most bytes ever in use on the device, where the platform counts them; else those in use now."""
    stats = memory_stats(device)
    return int(stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0)))


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes of the device, zero where the platform does not tell."""
    stats = memory_stats(device)
    total = int(stats.get("bytes_limit", 0))
    return max(total - int(stats.get("bytes_in_use", 0)), 0), total


def empty_cache() -> None:
    """Nothing to do: JAX gives memory back by itself."""


# ---------------------------------------------------------------------- random numbers
def manual_seed(seed: int) -> None:
    """Seed the current device's random numbers."""
    random.manual_seed(current_device(), seed)


def manual_seed_all(seed: int) -> None:
    """Seed the random numbers of every device (`torch.manual_seed` calls this)."""
    for index in {0, *random._defaults}:
        random.manual_seed(index, int(seed) + index)


def seed() -> int:
    """Seed the current device with a random number, and return it."""
    value = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu"))
    manual_seed(value)
    return value


def seed_all() -> int:
    """Seed every device with a random number, and return it."""
    value = seed()
    manual_seed_all(value)
    return value


def initial_seed() -> int:
    """The current device's seed."""
    return random.initial_seed(random.default(current_device()))


def get_rng_state(device: Any = "jax") -> torch.Tensor:
    """The device's RNG state, a CPU byte tensor."""
    return random.get_state(random.default(_index(device)))


def set_rng_state(new_state: torch.Tensor, device: Any = "jax") -> None:
    """Restore what `get_rng_state` gave."""
    random.set_state(random.default(_index(device)), new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    """The RNG state of every device."""
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Restore what `get_rng_state_all` gave."""
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What ``torch.autocast("jax", dtype=...)`` takes."""
    return [torch.bfloat16, torch.float16]


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """bfloat16 runs on every JAX platform."""
    return True


def _index(device: Any) -> int:
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "jax":
        raise ValueError(f"expected a device of type 'jax', e.g. 'jax:0'; got {str(device)!r}")
    return current_device() if device.index is None else device.index


from . import amp  # noqa: E402  (torch.jax.amp)
