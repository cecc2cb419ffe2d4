"""Plain values that decide a program: numbers, strings, dtypes in variables and attributes, submodules and hooks of modules.

They are read while a call is recorded, and are constants of its program. So a program remembers what it found, and another is
recorded when something is different. What a call has changed itself is not remembered: a counter counts recordings.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from torchax.tensor import Tensor

_PLAIN = frozenset((int, float, bool, str, complex, bytes, type(None), torch.dtype, torch.device))
_MISSING = object()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(x: Any) -> bool:
    """Whether a value is watched by value: a number, a string, a dtype, a device, None, or a short tuple of them."""
    return type(x) in _PLAIN or (type(x) is tuple and len(x) <= 8 and all(map(is_plain, x)))


def names_of(code: types.CodeType) -> set[str]:
    """Names of globals and attributes in the code, functions defined inside included."""
    return set(code.co_names).union(*(names_of(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def words_of(code: types.CodeType) -> set[Any]:
    """`names_of`, and strings in the code: keys of dicts."""
    found: set[Any] = set(code.co_names)
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            found |= words_of(c)
        elif isinstance(c, str):
            found.add(c)
    return found


class PlainValues:
    """Variables and entries of dicts that held plain values."""

    def __init__(self) -> None:
        self.cells: dict[int, tuple[Any, str]] = {}
        self.entries: dict[tuple[int, Any], tuple[dict[Any, Any], Any]] = {}
        self.values: list[Any] | None = None
        self.kinds: list[type] = []

    def note_variables(self, fn: types.FunctionType, with_globals: bool) -> None:
        """Variables that `fn` closes over, and globals that it names."""
        for cell, name in zip(fn.__closure__ or (), fn.__code__.co_freevars, strict=True):
            if is_plain(_content(cell)):
                self.cells[id(cell)] = cell, name
        if with_globals:
            self.note_entries(fn.__globals__, names_of(fn.__code__).intersection(fn.__globals__))

    def note_entries(self, table: dict[Any, Any], keys: Iterable[Any]) -> None:
        """Chosen entries of a dict."""
        for key in keys:
            if is_plain(table[key]):
                self.entries[id(table), key] = table, key

    def remember(self) -> None:
        """The values as they are now, before a recording."""
        self.values = self._now()

    def settle(self) -> list[str]:
        """Forget what has changed since `remember`; gives the names of numbers among them."""
        before, now = self.values or [], self._now()
        changed = [not _same(a, b) for a, b in zip(before, now, strict=True)]
        places = [*self.cells.values(), *self.entries.values()]
        counters = [
            c and type(a) in (int, float) and type(b) in (int, float)
            for a, b, c in zip(before, now, changed, strict=True)
        ]
        found = [str(place[1]) for place, counter in zip(places, counters, strict=True) if counter]
        n = len(self.cells)
        self.cells = {k: p for (k, p), different in zip(self.cells.items(), changed, strict=False) if not different}
        self.entries = {
            k: p for (k, p), different in zip(self.entries.items(), changed[n:], strict=True) if not different
        }
        self.watched_cells = [cell for cell, _ in self.cells.values()]
        self.watched = list(self.entries.values())
        self.values = self._now()
        self.kinds = list(map(type, self.values))
        return found

    def _now(self) -> list[Any]:
        return [
            *[_content(cell) for cell, _ in self.cells.values()],
            *[table.get(key, _MISSING) for table, key in self.entries.values()],
        ]

    def lost(self) -> str | None:
        """What is different, in words."""
        try:
            now = [c.cell_contents for c in self.watched_cells]
            now += [table[key] for table, key in self.watched]
            if list(map(type, now)) == self.kinds and now == self.values:
                return None
        except (KeyError, ValueError):  # deleted
            pass
        names = [*(name for _, name in self.cells.values()), *(key for _, key in self.watched)]
        for name, old, new in zip(names, self.values or (), self._now(), strict=True):
            if not _same(old, new):
                return f"{name!r}, {NUMBER}, {went(old, new)}"
        return None


NUMBER = "which the code reads"  # in reasons


def went(old: Any, new: Any) -> str:
    """How a plain value has changed, in words."""
    return f"went from {old!r} to {'none' if new is _MISSING else repr(new)}"


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and is_plain(a) and is_plain(b) and a == b


# ---------------------------------------------------------------------- modules
class _Changes:
    epoch = 0


_changes = _Changes()


def _noticing(change: Any) -> Any:
    @functools.wraps(change)
    def call(self: Any, name: str, *value: Any) -> None:
        _changes.epoch += 1
        change(self, name, *value)

    return call


# so that attributes of modules need not be looked at in every call, but only after some module's attribute was set
torch.nn.Module.__setattr__ = _noticing(torch.nn.Module.__setattr__)
torch.nn.Module.__delattr__ = _noticing(torch.nn.Module.__delattr__)


@functools.lru_cache(maxsize=1024)
def _words_of_class(kind: type) -> frozenset[Any]:
    classes = [c for c in kind.__mro__ if c not in (torch.nn.Module, object)]
    functions = [
        f for c in classes for n, f in vars(c).items() if isinstance(f, types.FunctionType) and n != "__init__"
    ]
    return frozenset().union(*(words_of(f.__code__) for f in functions))


def attributes_of(module: torch.nn.Module) -> dict[str, Any]:
    """Attributes of a module that its class's code reads: plain values, and tensors that are neither parameter nor buffer."""
    words = _words_of_class(type(module))
    return {
        k: v for k, v in vars(module).items() if k in words and k != "training" and (type(v) is Tensor or is_plain(v))
    }


class ModuleFacts:
    """What modules were like when a call was recorded.

    Args:
        noted: modules that were called, with their attributes before the call.
        tensors: parameters that were read.
    """

    def __init__(self, noted: list[tuple[torch.nn.Module, dict[str, Any]]], tensors: list[Tensor]):
        self.attributes = []
        for module, before in noted:
            names = [k for k, v in before.items() if _same(v, vars(module).get(k, _MISSING))]
            if names:
                self.attributes.append((type(module).__name__, vars(module), names, [before[k] for k in names]))
        self.hooks = [getattr(m, name) for m, _ in noted for name in _HOOKS]
        self.sizes = list(map(len, self.hooks))
        self.tensors = tensors
        self.tensor_hooks = self._tensor_hooks()
        self.hooked = [h for h in self.hooks if h] + [h for pair in self.tensor_hooks for h in pair if h]
        self.hooked_sizes = list(map(len, self.hooked))
        self.epoch, self.handles = _changes.epoch, RemovableHandle.next_id

    def _tensor_hooks(self) -> list[tuple[Any, Any]]:
        return [(t._backward_hooks, getattr(t, "_post_accumulate_grad_hooks", None)) for t in self.tensors]

    def failure(self) -> str | None:
        """What is different, in words."""
        if self.hooked and list(map(len, self.hooked)) != self.hooked_sizes:
            return _HOOK
        epoch, handles = _changes.epoch, RemovableHandle.next_id
        if epoch == self.epoch and handles == self.handles:
            return None
        if handles != self.handles:
            same = all(map(operator.is_, _flat(self._tensor_hooks()), _flat(self.tensor_hooks)))
            if not same or list(map(len, self.hooks)) != self.sizes:
                return _HOOK
        for kind, table, names, values in self.attributes:
            for name, old in zip(names, values, strict=True):
                if not _same(old, new := table.get(name, _MISSING)):
                    change = "is another tensor" if type(old) is Tensor else went(old, new)
                    return f"{name!r} of a {kind}, {NUMBER}, {change}"
        self.epoch, self.handles = epoch, handles
        return None


_HOOK = "a hook of a module or parameter was added or removed"


def _flat(pairs: list[tuple[Any, Any]]) -> list[Any]:
    return [x for pair in pairs for x in pair]
