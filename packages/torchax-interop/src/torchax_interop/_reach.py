"""Which parameters a function can reach: so that their gradients can be put back when recording it fails."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

_LIMIT = 10_000


def reachable_tensors(fn: Any, *more: Any) -> list[torch.Tensor]:
    """Tensors that require gradients and are found in what `fn` closes over, its globals, its object, and in `more`."""
    found: dict[int, torch.Tensor] = {}
    queue: list[tuple[Any, int]] = [(fn, 0), *((x, 0) for x in more)]
    seen: set[int] = set()
    while queue and len(seen) < _LIMIT:
        x, depth = queue.pop()
        if id(x) in seen or depth > 6:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            if x.requires_grad and x.is_leaf:
                found[id(x)] = x
        elif isinstance(x, torch.nn.Module):
            found.update((id(p), p) for p in x.parameters() if p.requires_grad)
        elif isinstance(x, torch.optim.Optimizer):
            found.update((id(p), p) for g in x.param_groups for p in g["params"] if p.requires_grad)
        else:
            queue.extend((y, depth + 1) for y in _parts(x))
    return list(found.values())


def _parts(x: Any) -> Any:
    if isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or () if _filled(c)]
        names = [x.__globals__[n] for n in x.__code__.co_names if n in x.__globals__]
        return (
            [*cells, *(v for v in names if not isinstance(v, (types.ModuleType, type))), *(x.__defaults__ or ())]
            if _users(x)
            else cells
        )
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, (list, tuple, set, frozenset)):
        return list(x)
    if isinstance(x, dict):
        return list(x.values())
    if hasattr(x, "__dict__") and not isinstance(x, (type, types.ModuleType)) and _users(x):
        return list(vars(x).values())
    return []


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _users(x: Any) -> bool:
    """Not a part of torch, JAX, numpy or Python itself."""
    module = getattr(x, "__module__", None) or type(x).__module__
    return str(module).split(".")[0] not in {
        "torch",
        "jax",
        "jaxlib",
        "numpy",
        "builtins",
        "torchax",
        "functools",
        "types",
    }
