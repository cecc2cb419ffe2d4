"""`torch.compile(fn, backend="torchax")`: says why it cannot be, as soon as it is asked for.

Dynamo follows Python code with fake tensors in place of real ones. It takes a tensor subclass only if that has no
`__torch_dispatch__` of its own, or is a wrapper around plain tensors (`__tensor_flatten__`), whose dispatch it then runs
on fake ones. Tensors on device ``jax`` wrap a `jax.Array` and are neither: Dynamo takes them for plain Python objects and
leaves the graph at the first operator, silently unless ``fullgraph=True``; a backend is never asked. So the backend is
refused when torch looks it up, which it does in `torch.compile` itself.
"""

from __future__ import annotations

from typing import Any

_WHY = (
    'torch.compile(..., backend="torchax") cannot be had with this torch: Dynamo does not trace tensors that wrap something else '
    "than torch tensors, and would run everything eagerly without saying so. Use torchax.compile(fn) or torchax.compile(module) "
    "instead: it compiles whole training steps, gradients and optimizers included, without graph breaks"
)


def __getattr__(name: str) -> Any:
    if name == "backend":  # what the entry point names
        raise RuntimeError(_WHY)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
