"""Which parameters a function can reach: so that their gradients can be put back when recording it fails."""

from __future__ import annotations

import functools
import operator
import types
from typing import Any

import torch

from ._plain import PlainValues, names_of, words_of

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


def reachable_owners(fn: Any) -> tuple[list[torch.nn.Module], list[torch.optim.Optimizer]]:
    """Modules and optimizers that are found in what `fn` closes over, its globals, its object."""
    modules: list[torch.nn.Module] = []
    optimizers: list[torch.optim.Optimizer] = []
    queue: list[tuple[Any, int]] = [(fn, 0)]
    seen: set[int] = set()
    while queue and len(seen) < _LIMIT:
        x, depth = queue.pop(0)
        if id(x) in seen or depth > 6:
            continue
        seen.add(id(x))
        if isinstance(x, torch.nn.Module):
            modules.append(x)
        elif isinstance(x, torch.optim.Optimizer):
            optimizers.append(x)
        elif not isinstance(x, torch.Tensor):
            queue.extend((y, depth + 1) for y in _parts(x))
    return modules, optimizers


def _parts(x: Any) -> Any:
    if isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or () if _filled(c)]
        names = [x.__globals__[n] for n in names_of(x.__code__) if n in x.__globals__]
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


class Places:
    """Where a function finds what it depends on: variables that it closes over, globals that it names, attributes, lists.

    Made before a recording, with what is there; `lost` then says whether it is there still. Tensors, modules and optimizers
    are told apart by identity; numbers, strings and the like, where the code names them, by value.

    Args:
        fn: the function.
    """

    def __init__(self, fn: Any):
        self.cells: list[tuple[Any, Any]] = []
        self.entries: list[tuple[dict[Any, Any], Any, Any]] = []
        self.lists: list[tuple[list[Any], list[Any]]] = []
        self.modules: list[torch.nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.plain = PlainValues()
        names: set[Any] = set()
        tables: list[dict[Any, Any]] = []
        methods: list[types.FunctionType] = []
        queue: list[tuple[Any, int]] = [(fn, 0)]
        seen: set[int] = set()
        while queue and len(seen) < _LIMIT:
            x, depth = queue.pop()
            if isinstance(x, torch.nn.Module) and id(x) not in seen:
                self.modules.append(x)
            if isinstance(x, torch.optim.Optimizer) and id(x) not in seen:
                self.optimizers.append(x)
            if id(x) in seen or depth > 6 or isinstance(x, (torch.Tensor, torch.nn.Module, torch.optim.Optimizer)):
                continue
            seen.add(id(x))
            self._note(x)
            if isinstance(x, types.FunctionType):
                names |= words_of(x.__code__)
                self.plain.note_variables(x, _users(x))
            elif isinstance(x, dict):
                tables.append(x)
            elif _is_object(x):
                tables.append(vars(x))
                methods += [f for c in type(x).__mro__ for f in vars(c).values() if isinstance(f, types.FunctionType)]
            queue.extend((y, depth + 1) for y in _parts(x))
        self._note_attributes(names, tables, methods)

    def _note_attributes(
        self, names: set[Any], tables: list[dict[Any, Any]], methods: list[types.FunctionType]
    ) -> None:
        """Plain values in objects and dicts, under names that the code of the function, and of methods named there, has."""
        called: set[types.FunctionType] = set()
        while more := {f for f in methods if f.__name__ in names} - called:
            called |= more
            for f in more:
                names |= words_of(f.__code__)
                self.plain.note_variables(f, _users(f))
        for table in tables:
            self.plain.note_entries(table, names.intersection(table))

    def _note(self, x: Any) -> None:
        if isinstance(x, types.FunctionType):
            self.cells += [(c, c.cell_contents) for c in x.__closure__ or () if _filled(c) and _holds(c.cell_contents)]
            if _users(x):
                named = x.__globals__
                self.entries += [(named, n, named[n]) for n in names_of(x.__code__) if _holds(named.get(n))]
        elif isinstance(x, list):
            if any(map(_holds, x)):
                self.lists.append((x, list(x)))
        elif isinstance(x, dict):
            self.entries += [(x, k, v) for k, v in x.items() if _holds(v)]
        elif _is_object(x):
            self.entries += [(vars(x), k, v) for k, v in vars(x).items() if _holds(v)]

    def only(self, used: Any) -> None:
        """Forget tensors of which `used` is false."""
        matters = lambda v: not isinstance(v, torch.Tensor) or used(v)
        self.cells = [(c, v) for c, v in self.cells if matters(v)]
        self.entries = [(d, k, v) for d, k, v in self.entries if matters(v)]
        self.lists = [(x, values) for x, values in self.lists if any(_holds(v) and matters(v) for v in values)]

    def lost(self) -> str | None:
        """What is not there any more, in words."""
        for cell, value in self.cells:
            if not _filled(cell) or cell.cell_contents is not value:
                return f"a variable that the function closes over holds another {_word(value)}"
        for table, key, value in self.entries:
            if table.get(key) is not value:
                return f"{key!r} is another {_word(value)}, or none"
        for found, values in self.lists:
            if len(found) != len(values) or not all(map(operator.is_, found, values)):
                return "a list of tensors that the function uses has changed"
        return self.plain.lost()


def _is_object(x: Any) -> bool:
    return hasattr(x, "__dict__") and not isinstance(x, (type, types.ModuleType, types.FunctionType)) and _users(x)


def _holds(x: Any) -> bool:
    return isinstance(x, (torch.Tensor, torch.nn.Module, torch.optim.Optimizer))


def _word(x: Any) -> str:
    return "tensor" if isinstance(x, torch.Tensor) else type(x).__name__
