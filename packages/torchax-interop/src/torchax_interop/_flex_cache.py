"""The forms of functions that have been met: recording one takes milliseconds, which an eager call should spend once.

A function is known again by its code and by everything that the code can reach: closures, defaults, and globals that it
names, looked at anew at every call. Tensors count by shape and dtype; while the function is recorded, tensors without
values stand for them, so that no form hangs on values. What cannot be told apart so (objects with attributes) is
recorded at every call.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from ._flex_forms import Form, Unknown, known_form

_PLAIN = (int, float, bool, str, type(None), torch.dtype)
_MOST = 256
_forms: dict[Any, tuple[Form, int | None] | Unknown] = {}


class _Untold(Exception):
    """Something may change without being seen to."""


def form_of(score_mod: Callable[..., Any], mask_mod: Callable[..., Any]) -> Form:
    """As `known_form`, at the price of a look-up where the functions are known.

    Raises:
        Unknown: they are of no known form.
    """
    tensors: list[torch.Tensor] = []
    try:
        key = _told((score_mod, mask_mod), tensors, ())
        found = _forms.get(key)
    except _Untold:
        return known_form(score_mod, mask_mod)
    if found is None:
        found = _recorded(score_mod, mask_mod, tensors)
        while len(_forms) >= _MOST:
            _forms.pop(next(iter(_forms)))
        _forms[key] = found
    if isinstance(found, Unknown):
        raise Unknown(*found.args)
    form, document = found
    return form if document is None else form._replace(documents=tensors[document])


def _recorded(
    score_mod: Callable[..., Any], mask_mod: Callable[..., Any], tensors: list[torch.Tensor]
) -> tuple[Form, int | None] | Unknown:
    stand_ins = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors]
    swapped = {id(t): s for t, s in zip(tensors, stand_ins, strict=True)}
    try:
        form = known_form(*_with((score_mod, mask_mod), swapped))
    except Unknown as error:
        return Unknown(*error.args)  # without the traceback, which holds tensors
    if form.documents is None:
        return form, None
    place = next((i for i, s in enumerate(stand_ins) if s is form.documents), None)
    return Unknown("it reads a tensor that it makes") if place is None else (form._replace(documents=None), place)


def _told(x: Any, tensors: list[torch.Tensor], within: tuple[Any, ...]) -> Any:
    """What tells `x` from others, hashable; tensors that it reaches are added to `tensors`."""
    if isinstance(x, _PLAIN):
        return type(x), x
    if isinstance(x, torch.Tensor):
        place = next((i for i, t in enumerate(tensors) if t is x), len(tensors))
        tensors += [x] if place == len(tensors) else []
        return "tensor", place, tuple(x.shape), x.dtype
    if isinstance(x, tuple | list):
        return type(x), *(_told(y, tensors, within) for y in x)
    if isinstance(x, types.FunctionType) and x not in within:
        inner = (*within, x)
        cells = [_content(c) for c in x.__closure__ or ()]
        reached = [*cells, x.__defaults__, *(x.__kwdefaults__ or {}).values(), *_globals(x).values()]
        return x.__code__, *(_told(y, tensors, inner) for y in reached)
    if isinstance(x, types.ModuleType) and x.__name__.partition(".")[0] == "torch":
        return x
    if isinstance(x, types.BuiltinFunctionType) and (x.__self__ is None or x.__self__ is torch.tanh.__self__):
        return x
    raise _Untold


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        raise _Untold from None


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """The globals that the function's code can name, functions inside of it included."""
    waiting, names = [function.__code__], set()
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}


def _with(x: Any, swapped: dict[int, torch.Tensor]) -> Any:
    """`x` with other tensors in place of those that it reaches."""
    if isinstance(x, torch.Tensor):
        return swapped[id(x)]
    if isinstance(x, tuple | list):
        return type(x)(_with(y, swapped) for y in x)
    if not isinstance(x, types.FunctionType) or not swapped:
        return x
    names = {**x.__globals__, **{name: _with(y, swapped) for name, y in _globals(x).items()}}
    cells = tuple(types.CellType(_with(_content(c), swapped)) for c in x.__closure__ or ())
    made = types.FunctionType(x.__code__, names, x.__name__, _with(x.__defaults__, swapped), cells)
    made.__kwdefaults__ = {k: _with(v, swapped) for k, v in (x.__kwdefaults__ or {}).items()}
    return made
