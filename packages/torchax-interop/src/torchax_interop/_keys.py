"""What a call is recognised by, and what is different between two calls, in words."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from torchax._storage import TensorMeta
from torchax.tensor import Tensor

from ._tree import Node, Spec

_STATIC = frozenset((int, float, bool, str, type(None), complex, bytes, torch.dtype, torch.device))

Key = tuple[Spec, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]  # nest, modes, leaves, who shares memory


def key_of_call(spec: Spec, leaves: list[Any]) -> Key:
    """The key of a call with these arguments, in the present modes."""
    return spec, mode(), tuple([key_of(x) for x in leaves]), aliases(leaves)


class _Identity:
    """An object as part of a key: the same only as itself."""

    __slots__ = ("x",)

    def __init__(self, x: Any):
        self.x = x

    def __hash__(self) -> int:
        return id(self.x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.x is self.x


def key_of(x: Any) -> Any:
    """What of an argument decides the program."""
    kind = type(x)
    if kind is Tensor:
        return (x._m, x.is_leaf) if x.requires_grad else x._m
    if kind in _STATIC:
        return kind, x
    if isinstance(x, torch.Tensor):
        return "cpu", tuple(x.shape), x.dtype, x.requires_grad, x.device
    if isinstance(x, jax.Array):
        return "array", x.aval
    if isinstance(x, np.ndarray):
        return "numpy", x.shape, x.dtype, x.tobytes() if x.dtype != object else _Identity(x)
    try:
        hash(x)
    except TypeError:
        return _Identity(x)
    return kind, x


_MODES = ("grad mode", "inference mode", "autocast", "the default dtype", "the precision of float32 products")


def mode() -> tuple[Any, ...]:
    """Settings of torch that decide what is recorded, in the order of `_MODES`."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype("jax") if torch.is_autocast_enabled("jax") else None,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )


def aliases(leaves: list[Any]) -> tuple[Any, ...]:
    """Which tensors among the arguments share memory, and how they view it."""
    storages = [x._s for x in leaves if type(x) is Tensor]
    if len(set(storages)) == len(storages):
        return ()
    place: dict[Any, int] = {}
    views = []
    for x in leaves:
        if type(x) is Tensor:
            views.append((place.setdefault(x._s, len(place)), None if x._v is None else (x._v.chain, x._v.positions)))
    geometry = tuple(s.geometry for s in place)
    return geometry, tuple(views)


# ---------------------------------------------------------------------- in words
def differences(old: Key, new: Key) -> list[str]:
    """What is different in the call `new`, in words."""
    found = [
        f"{name} went from {_setting(a)} to {_setting(b)}"
        for name, a, b in zip(_MODES, old[1], new[1], strict=True)
        if a != b
    ]
    if old[0] != new[0]:
        return [*found, _other_nest(old[0], new[0])]
    for path, a, b in zip(_paths_of_call(new[0]), old[2], new[2], strict=True):
        if a != b:
            found += [f"{path} {change}" for change in _changes(a, b)]
    if not found and old[3] != new[3]:
        found.append("other arguments than before share memory")
    return found


def _setting(x: Any) -> str:
    return {True: "on", False: "off", None: "off"}.get(x, str(x)) if isinstance(x, bool | None) else str(x)


def _changes(a: Any, b: Any) -> list[str]:
    """How an argument has changed, from its two keys."""
    old, new = _facts(a), _facts(b)
    if old is None or new is None:
        was, now = _describe(a, old), _describe(b, new)
        why = "" if new or old else " (what is not a tensor is part of the program)"
        return [f"went from {was} to {now}{why}"]
    if old[""] != new[""]:  # other strides follow
        del old["strides "], new["strides "]
    changed = [name for name in new if old[name] != new[name]]
    return [f"went from {name}{old[name]} to {name}{new[name]}" for name in changed] or ["changed"]


def _facts(key: Any) -> dict[str, Any] | None:
    """What tensors can differ in, most telling first; None of a key that is not a tensor's."""
    requires_grad, leaf = False, True
    if type(key) is tuple and type(key[0]) is TensorMeta:
        requires_grad, (key, leaf) = True, key
    if type(key) is TensorMeta:
        shape, dtype, device, strides = key.shape, key.dtype, key.device, key.strides
    elif type(key) is tuple and key[0] == "cpu":
        (_, shape, dtype, requires_grad, device), strides = key, None
    elif type(key) is tuple and key[0] == "array":
        shape, dtype, device, strides = tuple(key[1].shape), key[1].dtype, "a jax.Array", None
    else:
        return None
    return {
        "": shape,
        "dtype ": dtype,
        "device ": device,
        "requires_grad=": requires_grad,
        "strides ": strides,
        "is_leaf=": leaf,
    }


def _describe(key: Any, facts: dict[str, Any] | None) -> str:
    if facts is not None:
        return f"a tensor of shape {facts['']}"
    if isinstance(key, _Identity):
        return f"a {type(key.x).__name__} (told apart by identity)"
    if key[0] == "numpy":
        return f"a numpy array of shape {key[1]}"
    text = repr(key[1])
    return text if len(text) <= 60 else f"{text[:57]}..."


def _other_nest(old: Spec, new: Spec) -> str:
    (was, was_named), (now, now_named) = old[1], new[1]
    if len(was[1]) != len(now[1]):
        return f"it was called with {len(now[1])} positional argument(s), before with {len(was[1])}"
    if was_named[1] != now_named[1]:
        return f"it was called with the keywords {list(now_named[1])}, before with {list(was_named[1])}"
    for i, (a, b) in enumerate(zip(was[1], now[1], strict=True)):
        if a != b:
            return f"argument {i} is another nest of tuples, lists and dicts than before"
    for name, a, b in zip(now_named[1], was_named[2], now_named[2], strict=True):
        if a != b:
            return f"argument {name!r} is another nest of tuples, lists and dicts than before"
    return "the arguments are nested otherwise than before"


def _paths_of_call(spec: Spec) -> list[str]:
    args, kwargs = spec[1]
    named = [(f"argument {i}", s) for i, s in enumerate(args[1])]
    named += [(f"argument {name!r}", s) for name, s in zip(kwargs[1], kwargs[2], strict=True)]
    return [path for prefix, s in named for path in _paths(prefix, s)]


def _paths(prefix: str, spec: Spec) -> list[str]:
    """For each leaf, how a user would write it."""
    if spec is None:
        return [prefix]
    if type(spec) is Node:
        names = spec.context if isinstance(spec.context, tuple) else range(len(spec.children))
        parts = [
            (f"{prefix}.{n}" if isinstance(n, str) else f"{prefix}[{n}]", s)
            for n, s in zip(names, spec.children, strict=False)
        ]
        if len(parts) != len(spec.children):
            parts = [(f"{prefix}[{i}]", s) for i, s in enumerate(spec.children)]
    elif spec[0] is dict:
        parts = [(f"{prefix}[{n!r}]", s) for n, s in zip(spec[1], spec[2], strict=True)]
    else:
        parts = [(f"{prefix}[{i}]", s) for i, s in enumerate(spec[1])]
    return [path for p, s in parts for path in _paths(p, s)]
