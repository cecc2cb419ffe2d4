"""Nests of values: lists, tuples, dicts, what torch's pytree knows, caches of transformers, nodes registered with JAX.

A nest is taken apart into leaves and a spec. Specs are hashable and compare by value, so that they serve in cache keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import torch.utils._pytree as torch_tree
from torchax.tensor import Tensor

Spec = Any
_PLAIN = (int, float, str, bool, type(None), complex, bytes)


class Node:
    """A container other than tuple, list and dict: how to build it again from its children."""

    __slots__ = ("build", "children", "context", "kind")

    def __init__(self, kind: type, context: Any, children: tuple[Spec, ...], build: Callable[[list[Any]], Any]):
        self.kind, self.context, self.children, self.build = kind, context, children, build

    def __hash__(self) -> int:
        return hash((self.kind, self.children))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Node) or self.kind is not other.kind or self.children != other.children:
            return False
        return bool(self.context == other.context)


class Known:
    """Stands for an object that is part of the arguments (see `flatten`)."""

    __slots__ = ("index",)

    def __init__(self, index: int):
        self.index = index


def flatten(x: Any, leaves: list[Any], known: dict[int, int] | None = None, seen: list[Any] | None = None) -> Spec:
    """Append the leaves of `x` to `leaves`; gives the spec, None for a leaf.

    Args:
        x: a nest.
        leaves: receives its leaves, in order.
        known: id of mutable objects (caches) -> index; such an object becomes a leaf ``Known(index)``.
        seen: receives the mutable objects met, in order.
    """
    kind = type(x)
    if kind is Tensor or kind in _PLAIN:
        leaves.append(x)
        return None
    if kind is tuple:
        return tuple, tuple([flatten(y, leaves, known, seen) for y in x])
    if kind is list:
        return list, tuple([flatten(y, leaves, known, seen) for y in x])
    if kind is dict:
        return dict, tuple(x), tuple([flatten(y, leaves, known, seen) for y in x.values()])
    return _flatten_other(x, kind, leaves, known, seen)


def _flatten_other(x: Any, kind: type, leaves: list[Any], known: dict[int, int] | None, seen: list[Any] | None) -> Spec:
    if is_object(kind):
        if known is not None and id(x) in known:
            leaves.append(Known(known[id(x)]))
            return None
        if seen is not None:
            seen.append(x)
        names = tuple(x.__dict__)
        children = tuple([flatten(y, leaves, known, seen) for y in x.__dict__.values()])
        return Node(kind, names, children, lambda values: _new_object(kind, names, values))
    if known is not None and _is_record(x, kind):
        names = tuple([f.name for f in dataclasses.fields(x) if hasattr(x, f.name)])
        children = tuple([flatten(getattr(x, name), leaves, known, seen) for name in names])
        return Node(kind, names, children, lambda values: _new_record(kind, names, values))
    if torch_tree.tree_is_leaf(x) if not isinstance(x, jax.Array) else True:
        return _flatten_jax(x, kind, leaves, known, seen)
    children, spec = torch_tree.tree_flatten(x, is_leaf=lambda y: y is not x)
    child_specs = tuple([flatten(y, leaves, known, seen) for y in children])
    return Node(kind, spec, child_specs, lambda values: torch_tree.tree_unflatten(values, spec))


def _flatten_jax(x: Any, kind: type, leaves: list[Any], known: dict[int, int] | None, seen: list[Any] | None) -> Spec:
    if isinstance(x, jax.Array) or jax.tree_util.all_leaves([x]):
        leaves.append(x)
        return None
    children, spec = jax.tree_util.tree_flatten(x, is_leaf=lambda y: y is not x)
    child_specs = tuple([flatten(y, leaves, known, seen) for y in children])
    return Node(kind, spec, child_specs, lambda values: jax.tree_util.tree_unflatten(spec, values))


def unflatten(spec: Spec, leaves: Iterator[Any], seen: list[Any] | None = None) -> Any:
    """The nest again, from an iterator of leaves. `seen` receives the mutable objects, in the order of `flatten`."""
    if spec is None:
        return next(leaves)
    if type(spec) is Node:
        if is_object(spec.kind) and seen is not None:
            index = len(seen)
            seen.append(None)
            x = seen[index] = spec.build([unflatten(s, leaves, seen) for s in spec.children])
            return x
        return spec.build([unflatten(s, leaves, seen) for s in spec.children])
    if spec[0] is dict:
        return {k: unflatten(s, leaves, seen) for k, s in zip(spec[1], spec[2], strict=True)}
    return spec[0]([unflatten(s, leaves, seen) for s in spec[1]])


def tree_map(fn: Callable[[Any], Any], x: Any) -> Any:
    """`x` with `fn` applied to every leaf."""
    leaves: list[Any] = []
    spec = flatten(x, leaves)
    return unflatten(spec, iter([fn(leaf) for leaf in leaves]))


def tree_leaves(x: Any) -> list[Any]:
    """The leaves of `x`."""
    leaves: list[Any] = []
    flatten(x, leaves)
    return leaves


def broadcast_prefix(prefix: Any, spec: Spec, is_leaf: Callable[[Any], bool]) -> list[Any]:
    """For every leaf of `spec` the entry of `prefix` above it, as JAX matches shardings and axes with arguments."""
    if is_leaf(prefix) or spec is None:
        return [prefix] * count(spec)
    children = spec.children if type(spec) is Node else spec[-1]
    if isinstance(prefix, dict) and type(spec) is tuple and spec[0] is dict:
        parts = [prefix[k] for k in spec[1]]
    else:
        parts = list(prefix.values()) if isinstance(prefix, dict) else list(prefix)
    if len(parts) != len(children):
        raise ValueError(f"a nest of {len(parts)} entries cannot be matched with {len(children)} values")
    return [x for part, s in zip(parts, children, strict=True) for x in broadcast_prefix(part, s, is_leaf)]


def count(spec: Spec) -> int:
    """Number of leaves."""
    if spec is None:
        return 1
    return sum(map(count, spec.children if type(spec) is Node else spec[-1]))


_objects: dict[type, bool] = {}


def is_object(kind: type) -> bool:
    """Whether a class is one of transformers' caches or their layers: mutable objects that hold tensors in attributes."""
    found = _objects.get(kind)
    if found is None:
        names = {f"{c.__module__}.{c.__qualname__}" for c in kind.__mro__}
        found = _objects[kind] = bool(names & _CACHES) and kind not in torch_tree.SUPPORTED_NODES
    return found


def _is_record(x: Any, kind: type) -> bool:
    """Whether a result is a dataclass that holds a tensor and that nobody has registered: each call makes a new one."""
    if not dataclasses.is_dataclass(kind) or not torch_tree.tree_is_leaf(x) or not jax.tree_util.all_leaves([x]):
        return False
    return any(
        isinstance(y, Tensor | jax.Array)
        for f in dataclasses.fields(kind)
        for y in tree_leaves(getattr(x, f.name, None))
    )


def _new_record(kind: type, names: tuple[str, ...], values: list[Any]) -> Any:
    x = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(x, name, value)  # frozen ones, too
    return x


_CACHES = frozenset(
    f"transformers.cache_utils.{name}"
    for name in ("Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin", "DummyLayer")
)


def _new_object(kind: type, names: tuple[str, ...], values: list[Any]) -> Any:
    x = object.__new__(kind)
    x.__dict__.update(zip(names, values, strict=True))
    return x
