"""Ragged dimensions padded to a few sizes, so that a few programs serve all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax.tensor import Tensor

from ._tree import Known, count, flatten, unflatten

Sizes = dict[int, tuple[int, ...]]  # dimension -> sizes, ascending


class Buckets:
    """The option ``dynamic`` of `torchax.compile`.

    Args:
        fn: the compiled function, for the names of its arguments.
        dynamic: ``{dimension: sizes}``, or ``{argument's name: {dimension: sizes}}``.
    """

    def __init__(self, fn: Callable[..., Any], dynamic: Any):
        if not isinstance(dynamic, dict) or not dynamic:
            raise TypeError(f"dynamic is a dict such as {{0: (32, 64, 128)}}: dimension -> sizes; got {dynamic!r}")
        self.named: dict[str, Sizes] | None = None
        self.sizes: Sizes = {}
        if all(isinstance(k, str) for k in dynamic):
            self.signature = inspect.signature(fn)
            takes_any = any(p.kind is p.VAR_KEYWORD for p in self.signature.parameters.values())
            for name in dynamic:
                if name not in self.signature.parameters and not takes_any:
                    raise TypeError(
                        f"dynamic names {name!r}, which is not an argument of the function; it has "
                        f"{', '.join(self.signature.parameters) or 'none'}"
                    )
            self.named = {name: _checked(sizes) for name, sizes in dynamic.items()}
        else:
            self.sizes = _checked(dynamic)

    def call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``run(*args, **kwargs)`` with padded arguments; what comes back is cut to the size that was given."""
        objects: list[Any] = []
        flatten((args, kwargs), [], None, objects)  # caches are handed on as they are
        leaves: list[Any] = []
        spec = flatten((args, kwargs), leaves, {id(o): i for i, o in enumerate(objects)})
        leaves = [objects[x.index] if type(x) is Known else x for x in leaves]
        wanted = self._wanted(args, kwargs, spec, leaves)
        ragged: dict[int, tuple[int, int]] = {}  # dimension -> (size, bucket)
        for i, sizes in wanted:
            for d, buckets in sizes.items():
                if d < leaves[i].ndim and d not in ragged:
                    ragged[d] = leaves[i].shape[d], _bucket(leaves[i].shape[d], d, buckets)
        padded = list(leaves)
        made: dict[int, Any] = {}
        for i, sizes in wanted:
            x = leaves[i]
            widths = {d: ragged[d] for d in sizes if d < x.ndim}
            if self.named is None:
                widths = {d: (n, b) for d, (n, b) in widths.items() if x.shape[d] == n}
            for d, (n, _) in widths.items():
                if x.shape[d] != n:
                    raise ValueError(
                        f"dimension {d} of the arguments named in dynamic must have one size; got {n} and {x.shape[d]}"
                    )
            widths = {d: b - n for d, (n, b) in widths.items() if b != n}
            if id(x) in made:
                padded[i] = made[id(x)]
            elif widths:
                padded[i] = made[id(x)] = _pad(x, widths)
            elif isinstance(x, torch.Tensor) and x.requires_grad and x.is_leaf:
                padded[i] = made[id(x)] = x.view_as(
                    x
                )  # not a leaf, as the padded ones are not: one program serves both
        versions = [_version(x) for x in padded]
        new_args, new_kwargs = unflatten(spec, iter(padded))
        result = run(*new_args, **new_kwargs)
        given: dict[int, Any] = {}
        for x, p, version in zip(leaves, padded, versions, strict=True):
            if p is not x:
                given[id(p)] = x
                if _version(p) != version:  # written inside: so is what was given
                    with torch.no_grad():
                        x.copy_(
                            _cut(p, {d: n for d, (n, b) in ragged.items() if x.ndim > d and x.shape[d] != p.shape[d]})
                        )
        if not given:
            return result
        found: list[Any] = []
        known: list[Any] = []
        flatten(result, [], None, known)
        out_spec = flatten(result, found, {id(o): i for i, o in enumerate(known)})
        cut = [
            known[x.index] if type(x) is Known else given.get(id(x)) if id(x) in given else _shortened(x, ragged)
            for x in found
        ]
        return unflatten(out_spec, iter(cut))

    def _wanted(self, args: Any, kwargs: Any, spec: Any, leaves: list[Any]) -> list[tuple[int, Sizes]]:
        """Positions of the tensors that may be padded, and in which dimensions."""
        if self.named is None:
            return [(i, self.sizes) for i, x in enumerate(leaves) if _is_tensor(x)]
        (_, positional), (_, keywords, keyword_specs) = spec[1]
        names = _positional_names(self.signature, len(positional))
        found, at = [], 0
        for name, s in zip([*names, *keywords], [*positional, *keyword_specs], strict=True):
            n = count(s)
            if name in self.named:
                found += [(i, self.named[name]) for i in range(at, at + n) if _is_tensor(leaves[i])]
            at += n
        return found


def _checked(sizes: Any) -> Sizes:
    found: Sizes = {}
    for d, buckets in sizes.items() if isinstance(sizes, dict) else ():
        if isinstance(buckets, int):
            buckets = (buckets,)
        if not isinstance(d, int) or isinstance(d, bool) or d < 0:
            raise TypeError(f"dynamic takes dimensions counted from 0; got {d!r}")
        if not buckets or not all(isinstance(b, int) and b > 0 for b in buckets):
            raise TypeError(f"dynamic takes sizes above zero for dimension {d}; got {buckets!r}")
        found[d] = tuple(sorted(buckets))
    if not found:
        raise TypeError(f"dynamic takes {{dimension: sizes}}; got {sizes!r}")
    return found


def _positional_names(signature: inspect.Signature, n: int) -> list[str]:
    names = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), "")
    return names[:n] + [rest] * (n - len(names))


def _bucket(size: int, dimension: int, buckets: tuple[int, ...]) -> int:
    for b in buckets:
        if b >= size:
            return b
    raise ValueError(
        f"dimension {dimension} has {size} elements, more than the largest bucket, {buckets[-1]}; give dynamic a larger one "
        "or split the batch"
    )


def _is_tensor(x: Any) -> bool:
    return isinstance(x, (torch.Tensor, jax.Array))


def _pad(x: Any, widths: dict[int, int]) -> Any:
    """Zeros after the end of some dimensions."""
    if isinstance(x, jax.Array):
        return jnp.pad(x, [(0, widths.get(d, 0)) for d in range(x.ndim)])
    flat = [w for d in reversed(range(x.ndim)) for w in (0, widths.get(d, 0))]
    return torch.nn.functional.pad(x, flat)


def _cut(x: Any, sizes: dict[int, int]) -> Any:
    for d, n in sizes.items():
        x = x.narrow(d, 0, n) if isinstance(x, torch.Tensor) else jax.lax.slice_in_dim(x, 0, n, axis=d)
    return x


def _shortened(x: Any, ragged: dict[int, tuple[int, int]]) -> Any:
    if not _is_tensor(x):
        return x
    return _cut(x, {d: n for d, (n, b) in ragged.items() if d < x.ndim and x.shape[d] == b and n != b})


def _version(x: Any) -> Any:
    return (
        x._s.version
        if type(x) is Tensor
        else x._version
        if isinstance(x, torch.Tensor) and not x.is_inference()
        else None
    )
