"""`torch.accelerator` for device ``jax``: torch asks C++ for the current device, which knows only one; `device` knows."""

from __future__ import annotations

from typing import Any

import torch

from . import device


def install() -> None:
    """Answer what `torch.accelerator` asks `torch._C`, as long as ``jax`` is the current accelerator."""
    for name, function in _ANSWERS.items():
        asked = getattr(torch._C, name, None)
        if asked is not None:
            setattr(torch._C, name, _answering(function, asked))


def _answering(ours: Any, theirs: Any) -> Any:
    def answer(*args: Any) -> Any:
        accelerator = torch._C._accelerator_getAccelerator()
        return (ours if accelerator is not None and accelerator.type == "jax" else theirs)(*args)

    return answer


def _exchange(index: int) -> int:
    previous = device.current_device()
    if index >= 0:
        device.set_device(index)
    return previous


def _set(index: int) -> None:
    _exchange(index)


def _stats(index: int) -> dict[str, Any]:
    counted = {"current": device.memory_allocated(index), "peak": device.max_memory_allocated(index)}
    return {"allocated_bytes": {"all": counted}, "reserved_bytes": {"all": counted}}


_ANSWERS = {
    "_accelerator_getDeviceIndex": device.current_device,
    "_accelerator_setDeviceIndex": _set,
    "_accelerator_exchangeDevice": _exchange,
    "_accelerator_maybeExchangeDevice": _exchange,
    "_accelerator_synchronizeDevice": device.synchronize,
    "_accelerator_isAllocatorInitialized": lambda: True,
    "_accelerator_getDeviceStats": _stats,
    "_accelerator_getMemoryInfo": device.mem_get_info,
    "_accelerator_emptyCache": device.empty_cache,
    "_accelerator_emptyHostCache": device.empty_cache,
    "_accelerator_resetAccumulatedStats": lambda index: None,
    "_accelerator_resetPeakStats": lambda index: None,
}
