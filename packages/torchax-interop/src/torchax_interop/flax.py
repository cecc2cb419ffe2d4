"""flax and torch modules inside of each other: `FlaxNNModule`, `NNXModule`; `TorchLinen`, `TorchNNX`. Needs flax.

Gradients go through in both directions; running statistics are kept up to date where the outer world has a place for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from flax import linen, nnx
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flax":
        raise
    raise ImportError("torchax.flax needs flax, which is not installed: pip install flax") from None

import jax
import torch
from torchax import random as _random
from torchax.environment import Environment

from ._enter import to_array
from ._tree import tree_map
from .autograd import call_differentiable
from .jit import extract_jax
from .modules import TensorTree


# ---------------------------------------------------------------------- flax in torch
class FlaxNNModule(torch.nn.Module):
    """A linen module as a `torch.nn.Module`.

    Its ``params`` are parameters (``params.Dense_0.kernel``), other collections buffers, which calls in training mode write.
    Random streams that the module asks for come from torchax's random numbers.

    Args:
        module: the linen module (a `torchax.default_env` before it is taken, and not needed).
        sample_args: arguments of a call, tensors or arrays, from whose shapes the parameters are made.
        sample_kwargs: its keyword arguments.
        rngs: names of the random streams that calls need besides ``params``.
        method: the method to call; the module's ``__call__`` if None.
    """

    def __init__(
        self, *args: Any, sample_kwargs: dict[str, Any] | None = None, rngs: Any = ("dropout",), method: Any = None
    ):
        super().__init__()
        if args and isinstance(args[0], Environment):
            args = args[1:]
        if len(args) == 3 and sample_kwargs is None:
            args, sample_kwargs = args[:2], args[2]
        if len(args) != 2 or not isinstance(args[0], linen.Module):
            raise TypeError(
                "FlaxNNModule takes a flax.linen.Module and a tuple of sample arguments; got "
                f"({', '.join(type(a).__name__ for a in args)})"
            )
        self.module, self.method, self.rngs = args[0], method, tuple(rngs)
        sample = tree_map(to_array, (tuple(args[1]), sample_kwargs or {}))
        variables = self.module.init(self._keys("params", *self.rngs), *sample[0], **sample[1], method=method)
        variables = {name: linen.meta.unbox(collection) for name, collection in variables.items()}
        self.params = TensorTree(variables.pop("params", {}))
        self.collections = torch.nn.ModuleDict({name: TensorTree(c, trainable=False) for name, c in variables.items()})

    @staticmethod
    def _keys(*names: str) -> dict[str, jax.Array]:
        return {name: _random.default(0).next_key() for name in names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call, on tensors."""
        names = list(self.collections) if self.training else []
        rngs = self._keys(*self.rngs) if self.training else {}

        def run(params: Any, others: Any, args: Any, kwargs: Any) -> Any:
            options = {"rngs": rngs, "method": self.method, "mutable": names or False}
            found = self.module.apply({"params": params, **others}, *args, **kwargs, **options)
            return (found[0], dict(found[1])) if names else (found, {})

        others = {name: tree(copied=bool(names)) for name, tree in self.collections.items()}
        out, written = call_differentiable(run, (self.params(), others, args, kwargs), {})
        for name, values in written.items():
            self.collections[name].update(values)  # type: ignore[operator]
        return out


class NNXModule(torch.nn.Module):
    """An NNX module as a `torch.nn.Module`.

    Its `nnx.Param`s are parameters (``params.linear.kernel``); other variables, running statistics and random states, are
    buffers that calls write. ``train()`` and ``eval()`` reach the NNX module. The NNX module given is copied, not changed.

    Args:
        module: the `flax.nnx.Module`.
    """

    def __init__(self, module: nnx.Module):
        super().__init__()
        if not isinstance(module, nnx.Module):
            raise TypeError(f"NNXModule takes a flax.nnx.Module; got {type(module).__name__}")
        self._graph, params, rest = nnx.split(module, nnx.Param, ...)
        leaves, self._rest = jax.tree_util.tree_flatten(rest)
        self._impls = [_impl(x) for x in leaves]
        self.params = TensorTree(params, suffix=".value")
        rest = jax.tree_util.tree_unflatten(self._rest, [_key_data(x) for x in leaves])
        self.rest = TensorTree(rest, trainable=False, suffix=".value")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call, on tensors."""

        def run(params: Any, rest: list[Any], args: Any, kwargs: Any) -> Any:
            keys = [
                x if impl is None else jax.random.wrap_key_data(x, impl=impl)
                for x, impl in zip(rest, self._impls, strict=True)
            ]
            module = nnx.merge(self._graph, params, jax.tree_util.tree_unflatten(self._rest, keys))
            module.train() if self.training else module.eval()
            out = module(*args, **kwargs)
            _, _, after = nnx.split(module, nnx.Param, ...)
            return out, [_key_data(x) for x in jax.tree_util.tree_leaves(after)]

        out, after = call_differentiable(
            run, (self.params(), [t.clone() for t in self.rest.tensors()], args, kwargs), {}
        )
        with torch.no_grad():
            for old, new in zip(self.rest.tensors(), after, strict=True):
                old.copy_(new)
        return out


def _impl(x: Any) -> str | None:
    return str(jax.random.key_impl(x)) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else None


def _key_data(x: Any) -> Any:
    return x if _impl(x) is None else jax.random.key_data(x)


# ---------------------------------------------------------------------- torch in flax
class TorchLinen(linen.Module):
    """A torch module as a linen module.

    Its parameters are in the collection ``params`` under their torch names, with the torch module's values at first; its
    buffers in ``batch_stats``, written where that collection is mutable. Random numbers come from the stream ``dropout``.

    Attributes:
        module: the torch module, on any device; it is not changed.
        method: the method to call; the module itself if None.
        train: training mode of the calls; the module's own if None.
    """

    module: torch.nn.Module
    method: str | None = None
    train: bool | None = None

    @linen.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trainable, others, fn = _taken_apart(self.module, self.method)
        states = {name: self.param(name, lambda _, x=x: x) for name, x in trainable.items()}
        variables = {name: self.variable("batch_stats", name, lambda x=x: x) for name, x in others.items()}
        states.update({name: v.value for name, v in variables.items()})
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        out, after = _called(fn, self.module, self.train, states, args, kwargs, key)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            for name, v in variables.items():
                v.value = after[name]
        return out


class TorchNNX(nnx.Module):
    """A torch module as an NNX module.

    Its parameters are `nnx.Param`s in ``params`` under their torch names, its buffers `nnx.BatchStat`s in ``buffers``, which
    calls write. ``train()`` and ``eval()`` decide the torch module's mode.

    Args:
        module: the torch module, on any device; it is not changed.
        rngs: where random numbers come from, its stream ``dropout``; without it they are torchax's.
        method: the method to call; the module itself if None.
    """

    def __init__(self, module: torch.nn.Module, rngs: Any = None, method: str | None = None):
        trainable, others, fn = _taken_apart(module, method)
        self.module, self.fn = nnx.static(_Static(module)), nnx.static(fn)
        self.params = nnx.Dict({name: nnx.Param(x) for name, x in trainable.items()})
        self.buffers = nnx.Dict({name: nnx.BatchStat(x) for name, x in others.items()})
        self.rngs = rngs
        self.deterministic = not module.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        states = {name: v[...] for name, v in (*self.params.items(), *self.buffers.items())}
        key = self.rngs.dropout() if self.rngs is not None else None
        out, after = _called(self.fn, self.module.value, not self.deterministic, states, args, kwargs, key)
        for name, v in self.buffers.items():
            v[...] = after[name]
        return out


class _Static:
    """Something that is part of a module's structure."""

    def __init__(self, value: Any):
        self.value = value


def _taken_apart(
    module: torch.nn.Module, method: str | None
) -> tuple[dict[str, Any], dict[str, Any], Callable[..., Any]]:
    states, fn = extract_jax(module, method, mutable=True)
    names = {name for name, _ in module.named_parameters()}
    return {n: x for n, x in states.items() if n in names}, {n: x for n, x in states.items() if n not in names}, fn


def _called(
    fn: Any, module: torch.nn.Module, train: bool | None, states: Any, args: Any, kwargs: Any, key: Any
) -> tuple[Any, Any]:
    if train is None or train == module.training:
        return fn(states, args, kwargs, key=key)
    modes = {m: m.training for m in module.modules()}
    module.train(train)
    try:
        return fn(states, args, kwargs, key=key)
    finally:
        for m, mode in modes.items():
            m.training = mode


__all__ = ["FlaxNNModule", "NNXModule", "TorchLinen", "TorchNNX"]
