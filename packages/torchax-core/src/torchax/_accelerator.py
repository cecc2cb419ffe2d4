"""The current device where torch asks C++ for it, which knows only device 0; `device` knows.

`torch.accelerator` asks `torch._C`. ``tensor.to("jax")`` and ``torch.tensor(..., device="jax")`` ask the C++ device guard,
whose answer Python cannot change: there, the index is filled in before C++ looks.
"""

from __future__ import annotations

from typing import Any

import torch

from . import device

_ASKING = {  # the ops that ask the guard, and for which tensors; `Tensor.to` has filled in the index by itself
    "to.device": ("CPU", "AutogradCPU", "Lazy", "AutogradLazy"),
    "to.dtype_layout": ("CPU", "AutogradCPU"),
}
_libraries: dict[str, torch.library.Library] = {}


def install() -> None:
    """Answer what `torch.accelerator` asks `torch._C`, as long as ``jax`` is the current accelerator."""
    for name, function in _ANSWERS.items():
        asked = getattr(torch._C, name, None)
        if asked is not None:
            setattr(torch._C, name, _answering(function, asked))


def follow_current_device() -> None:
    """Have ``cpu_tensor.to("jax")`` go to the current device.

    The kernels make moves between devices a few microseconds slower, so they come with the first current device that is
    not the one that C++ answers.
    """
    if _libraries:
        return
    for name, keys in _ASKING.items():
        kernel = _to_current(getattr(torch.ops.aten.to, name.removeprefix("to.")))
        for key in keys:
            if key not in _libraries:
                _libraries[key] = torch.library.Library("aten", "IMPL", key)
            _libraries[key].impl(name, kernel)


def _to_current(op: Any) -> Any:
    composite = torch._C.DispatchKey.CompositeImplicitAutograd

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and type(args[0]) is torch.device:
            args = (device.with_index(args[0]), *args[1:])
        elif kwargs.get("device") is not None:
            kwargs["device"] = device.with_index(kwargs["device"])
        return op._op_dk(composite, self, *args, **kwargs)

    return to


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
