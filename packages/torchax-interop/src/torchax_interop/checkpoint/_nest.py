"""A nest of values as named tensors and a description in plain JSON values, and the nest again.

The three formats hold the same: tensors by name (``model.0.weight``), and the description as JSON. Building the nest again
imports nothing and calls nothing that the description names.
"""

from __future__ import annotations

import base64
import collections
import copy
import sys
import types
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch.utils._pytree as torch_tree
from torchax import dtypes
from torchax.errors import CheckpointError
from torchax.tensor import Tensor


class Leaf:
    """A tensor of a checkpoint that has not been read yet.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape.
        dtype: its `torch.dtype`.
        entry: how it was described when saved: kind, device, requires_grad.
        cast: the dtype to read it in, if that is another.
        wanted: the tensor or array of the target in its place, None without a target.
    """

    __slots__ = ("cast", "dtype", "entry", "name", "shape", "wanted")

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, entry: dict[str, Any] | None = None):
        self.name, self.shape, self.dtype = name, shape, dtype
        self.entry = entry or {"kind": "tensor", "device": "cpu", "requires_grad": False}
        self.cast: torch.dtype | None = None
        self.wanted: Any = None


class Container(NamedTuple):
    """What holds other values: its kind, the keys and values in it, and how to make one like it of other values."""

    kind: str
    keys: list[Any]
    values: list[Any]
    build: Callable[[list[Any]], Any]


def open_container(x: Any) -> Container | None:
    """The contents of a container: mappings, named tuples, lists, tuples, what torch's or JAX's pytrees know. None for a leaf."""
    if isinstance(x, (torch.Tensor, jax.Array, np.ndarray, Leaf, str, bytes)) or x is None:
        return None
    if isinstance(x, Mapping):
        keys = list(x)
        return Container("dict", keys, [x[k] for k in keys], lambda values: _like(x, keys, values))
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        kind = type(x)
        return Container("namedtuple", list(kind._fields), list(x), lambda values: tuple.__new__(kind, values))  # type: ignore[attr-defined]
    if isinstance(x, (list, tuple)) and type(x) not in torch_tree.SUPPORTED_NODES.keys() - {list, tuple}:
        kind = type(x) if type(x) in (list, tuple) else list if isinstance(x, list) else tuple
        return Container("list" if kind is list else "tuple", list(range(len(x))), list(x), kind)
    if not torch_tree.tree_is_leaf(x):
        values, spec = torch_tree.tree_flatten(x, is_leaf=lambda y: y is not x)
        return Container("node", list(range(len(values))), values, lambda new: torch_tree.tree_unflatten(new, spec))
    if not jax.tree_util.all_leaves([x]):
        found, tree = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
        keys = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found]
        return Container("node", keys, [v for _, v in found], lambda new: jax.tree_util.tree_unflatten(tree, new))
    return None


def _like(x: Any, keys: list[Any], values: list[Any]) -> Any:
    """A mapping of the kind of `x` (a defaultdict keeps its factory, a state_dict its versions)."""
    items = dict(zip(keys, values, strict=True))
    if type(x) is dict:
        return items
    if isinstance(x, MutableMapping):
        try:
            made = copy.copy(x)
            made.clear()
            made.update(items)
            return made
        except Exception:  # a mapping with rules of its own
            return items
    return type(x)(items)  # type: ignore[call-arg]


# ---------------------------------------------------------------------- describing
class Described(NamedTuple):
    """The description of a nest, and its tensors (`jax.Array`, numpy array or CPU tensor) by name."""

    tree: Any
    tensors: dict[str, Any]


def describe(state: Any) -> Described:
    """The nest as a description and named tensors.

    Raises:
        CheckpointError: a value cannot be saved; names its place.
    """
    found = Described(None, {})
    return found._replace(tree=_describe(state, (), found.tensors))


def place_name(path: tuple[Any, ...]) -> str:
    """The name of a place in a nest: the keys on the way, with dots between."""
    return ".".join(map(str, path)) or "state"


def _describe(x: Any, path: tuple[Any, ...], tensors: dict[str, Any]) -> Any:
    if isinstance(x, torch.nn.Module):
        x = x.state_dict()
    if isinstance(x, (torch.Tensor, jax.Array, np.ndarray, np.generic)):
        return _describe_tensor(x, path, tensors)
    if x is None or type(x) in (bool, int, float, str):
        return {"kind": "value", "value": x}
    if isinstance(x, complex):
        return {"kind": "complex", "value": [x.real, x.imag]}
    if isinstance(x, bytes):
        return {"kind": "bytes", "value": base64.b64encode(x).decode()}
    if isinstance(x, (torch.dtype, torch.device)):
        return {"kind": type(x).__name__, "value": str(x)}
    container = open_container(x)
    if container is None:
        raise CheckpointError(
            f"{place_name(path)} is a {type(x).__module__}.{type(x).__qualname__}, which a checkpoint cannot hold; save nests of "
            "tensors, arrays, numbers and strings (for a module its state_dict())"
        )
    values = [_describe(v, (*path, k), tensors) for k, v in zip(container.keys, container.values, strict=True)]
    if container.kind == "dict":
        described = {
            "kind": "dict",
            "items": [[_describe_key(k, path), v] for k, v in zip(container.keys, values, strict=True)],
        }
        for name in ("OrderedDict", "Counter"):
            if type(x) is getattr(collections, name):
                described["type"] = name
        if isinstance(getattr(x, "_metadata", None), Mapping):  # versions of the modules in a state_dict
            described["versions"] = {k: dict(v) for k, v in x._metadata.items()}
        return described
    if container.kind == "namedtuple":
        kind = type(x)
        return {
            "kind": "namedtuple",
            "type": f"{kind.__module__}:{kind.__qualname__}",
            "fields": container.keys,
            "items": values,
        }
    if container.kind == "node":
        return {"kind": "node", "items": values}
    return {"kind": container.kind, "items": values}


def _describe_key(key: Any, path: tuple[Any, ...]) -> Any:
    if type(key) is tuple:
        return {"kind": "tuple", "items": [_describe_key(k, path) for k in key]}
    if key is not None and type(key) not in (bool, int, float, str):
        raise CheckpointError(
            f"{place_name(path)} has a key of type {type(key).__qualname__}, which a checkpoint cannot hold; use strings and numbers"
        )
    return {"kind": "value", "value": key}


def _describe_tensor(x: Any, path: tuple[Any, ...], tensors: dict[str, Any]) -> Any:
    entry: dict[str, Any] = {"kind": "numpy"}
    if isinstance(x, torch.Tensor):
        kind = "parameter" if isinstance(x, torch.nn.Parameter) else "tensor"
        entry = {"kind": kind, "device": str(x.device), "requires_grad": x.requires_grad}
        x = x.detach()
        x = x.jax() if isinstance(x, Tensor) else x
    elif isinstance(x, jax.Array):
        entry = {"kind": "array"}
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            entry = {"kind": "key", "impl": str(jax.random.key_impl(x))}
            x = jax.random.key_data(x)
    else:
        x = np.asarray(x)
    name = place_name(path)
    try:
        dtype = x.dtype if isinstance(x, torch.Tensor) else dtypes.to_torch(np.dtype(x.dtype))
        dtypes.to_jax(dtype)
        if isinstance(x, torch.Tensor) and (x.layout is not torch.strided or x.is_nested):
            raise TypeError
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"{name} has dtype {x.dtype}, which a checkpoint cannot hold; save a dense tensor of another"
        ) from error
    while name in tensors:  # keys that only look the same: 1 and "1"
        name += "_"
    tensors[name] = x
    return {**entry, "name": name, "shape": list(x.shape), "dtype": str(dtype).removeprefix("torch.")}


# ---------------------------------------------------------------------- building
def rebuild(d: Any) -> Any:
    """The nest that a description tells of, with a `Leaf` for every tensor.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is no description.
    """
    kind = d["kind"]
    if kind in ("tensor", "parameter", "array", "numpy", "key"):
        dtype = getattr(torch, d["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{d['dtype']!r} is no dtype")
        return Leaf(str(d["name"]), tuple(map(int, d["shape"])), dtype, d)
    if kind == "value":
        return d["value"]
    if kind == "complex":
        return complex(*d["value"])
    if kind == "bytes":
        return base64.b64decode(d["value"])
    if kind == "dtype":
        return getattr(torch, d["value"].removeprefix("torch."))
    if kind == "device":
        return torch.device(d["value"])
    if kind == "dict":
        made = {"OrderedDict": collections.OrderedDict, "Counter": collections.Counter}.get(d.get("type"), dict)()
        made.update({rebuild(k): rebuild(v) for k, v in d["items"]})
        if "versions" in d:
            made._metadata = collections.OrderedDict(d["versions"])  # type: ignore[attr-defined]
        return made
    items = [rebuild(x) for x in d["items"]]
    if kind == "namedtuple":
        return _named(d["type"], tuple(d["fields"]), items)
    return tuple(items) if kind == "tuple" else items


def _named(name: str, fields: tuple[str, ...], items: list[Any]) -> Any:
    """A named tuple of a class that is loaded already, else of one made for it. Nothing is imported, nothing is called."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, (type, types.ModuleType)) else None
    if not (isinstance(found, type) and issubclass(found, tuple) and getattr(found, "_fields", None) == fields):
        found = collections.namedtuple(qualname.rsplit(".", 1)[-1] or "Record", fields, rename=True)  # type: ignore[misc]
    return tuple.__new__(found, items)


def leaves(state: Any) -> list[Leaf]:
    """All `Leaf`s of a nest."""
    if isinstance(state, Leaf):
        return [state]
    container = open_container(state)
    return [leaf for v in container.values for leaf in leaves(v)] if container is not None else []


def replace(state: Any, values: dict[int, Any]) -> Any:
    """The nest with the value of every `Leaf` (by its id) in its place."""
    if isinstance(state, Leaf):
        return values[id(state)]
    container = open_container(state)
    return state if container is None else container.build([replace(v, values) for v in container.values])


# ---------------------------------------------------------------------- fitting
def fit(state: Any, target: Any, source: str) -> Any:
    """`state` in the containers of `target`: mappings by key, everything else by position.

    Raises:
        CheckpointError: they differ; names every value that is missing, too many, or of another shape or dtype.
    """
    problems: list[str] = []
    found = _fit(state, target, (), problems)
    if problems:
        raise CheckpointError(f"the checkpoint {source} does not fit the target: {listed(problems, '; ')}")
    return found


def listed(items: list[str], between: str = ", ", most: int = 20) -> str:
    """Up to `most` items, and how many more there are."""
    more = len(items) - most
    return between.join(items[:most]) + (f"{between}and {more} more" if more > 0 else "")


def _fit(state: Any, target: Any, path: tuple[Any, ...], problems: list[str]) -> Any:
    if isinstance(target, torch.nn.Module):
        target = target.state_dict()
    wanted, held, place = open_container(target), open_container(state), place_name(path)
    if wanted is None:
        return _fit_leaf(state, target, held, place, problems)
    if held is None:
        problems.append(f"{place} is {_said(state)}, the target has {_said(target)}")
        return None
    if wanted.kind == "dict":
        if held.kind != "dict":
            problems.append(f"{place} is {_said(state)}, the target has {_said(target)}")
            return None
        missing, extra = [k for k in wanted.keys if k not in state], [k for k in held.keys if k not in target]
        problems.extend(f"{place_name((*path, k))} is not in the checkpoint" for k in missing)
        problems.extend(f"{place_name((*path, k))} is not in the target" for k in extra)
        values = [
            _fit(state[k], v, (*path, k), problems) if k in state else None
            for k, v in zip(wanted.keys, wanted.values, strict=True)
        ]
        return wanted.build(values)
    if len(held.values) != len(wanted.values):
        problems.append(f"{place} has {len(held.values)} values, the target {len(wanted.values)}")
        return None
    pairs = zip(wanted.keys, held.values, wanted.values, strict=True)
    values = [_fit(h, w, (*path, k), problems) for k, h, w in pairs]
    return None if problems else wanted.build(values)


def _fit_leaf(state: Any, target: Any, held: Container | None, place: str, problems: list[str]) -> Any:
    shaped = hasattr(target, "shape") and hasattr(target, "dtype")
    if held is not None or isinstance(state, Leaf) != shaped:
        problems.append(f"{place} is {_said(state)}, the target has {_said(target)}")
        return None
    if not isinstance(state, Leaf):
        return state
    key = isinstance(target, jax.Array) and jax.dtypes.issubdtype(target.dtype, jax.dtypes.prng_key)
    if key != (state.entry["kind"] == "key"):
        problems.append(f"{place} is {_said(state)}, the target has {_said(target)}")
        return None
    shape = tuple(jax.random.key_data(target).shape if key else target.shape)
    if state.shape != shape:
        problems.append(f"{place} has shape {state.shape}, the target {shape}")
    dtype = target.dtype if isinstance(target, torch.Tensor) or key else dtypes.to_torch(np.dtype(target.dtype))
    if not key and (state.cast or state.dtype) != dtype:
        problems.append(f"{place} has dtype {state.cast or state.dtype}, the target {dtype}")
    state.wanted = target
    return state


def _said(x: Any) -> str:
    if isinstance(x, Leaf):
        return f"a tensor of shape {x.shape}" if x.entry["kind"] != "key" else "a PRNG key"
    if hasattr(x, "shape"):
        return f"a tensor of shape {tuple(x.shape)}"
    container = open_container(x)
    if container is None:
        return f"the {type(x).__name__} {x!r}"
    if container.kind == "dict":
        return f"a dict of {len(container.keys)} keys"
    return f"a {type(x).__name__} of {len(container.values)} values"
