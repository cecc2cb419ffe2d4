"""A JAX function with its parameters as a `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax.tensor import Tensor

from .autograd import call_differentiable


class TensorTree(torch.nn.Module):
    """A pytree of arrays as a module: parameters and buffers named after the paths, ``state_dict`` and ``.to`` as usual.

    Args:
        tree: a pytree of `jax.Array`s.
        trainable: whether a leaf, a floating one, becomes a parameter; the others are buffers.
        suffix: an ending that is left out of the names.
    """

    def __init__(self, tree: Any, trainable: bool = True, suffix: str = ""):
        super().__init__()
        found, self._structure = jax.tree_util.tree_flatten_with_path(tree)
        self._places: list[tuple[torch.nn.Module, str]] = []
        for path, leaf in found:
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(suffix) or "value"
            self._places.append(self._add(name.split("."), jnp.asarray(leaf), trainable))

    def _add(self, parts: list[str], array: jax.Array, trainable: bool) -> tuple[torch.nn.Module, str]:
        owner: torch.nn.Module = self
        for part in parts[:-1]:
            part = part or "_"
            child = owner._modules.get(part)
            if child is None:
                part = _free(owner, part)
                owner.add_module(part, child := torch.nn.Module())
            owner = child
        name = _free(owner, parts[-1] or "_")
        tensor = Tensor(array)
        if trainable and (tensor.is_floating_point() or tensor.is_complex()):
            owner.register_parameter(name, torch.nn.Parameter(tensor))
        else:
            owner.register_buffer(name, tensor)
        return owner, name

    def tensors(self) -> list[torch.Tensor]:
        """The leaves."""
        return [getattr(owner, name) for owner, name in self._places]

    def forward(self, copied: bool = False) -> Any:
        """The pytree, of tensors.

        Args:
            copied: of copies, for what is written before the backward, which needs the old values.
        """
        leaves = [t.clone() for t in self.tensors()] if copied else self.tensors()
        return jax.tree_util.tree_unflatten(self._structure, leaves)

    def update(self, tree: Any) -> None:
        """Write other values into the leaves."""
        with torch.no_grad():
            for old, new in zip(self.tensors(), jax.tree_util.tree_leaves(tree), strict=True):
                old.copy_(new)


def _free(owner: torch.nn.Module, name: str) -> str:
    while hasattr(owner, name):  # "training", "type", ...: taken by torch.nn.Module
        name += "_"
    return name


class JaxModule(torch.nn.Module):
    """A pure JAX function with parameters as a `torch.nn.Module`; torch's autograd and optimizers, `torchax.compile` take it as any other.

    Args:
        fn: ``fn(params, *args, **kwargs)`` over `jax.Array`s.
        params: a pytree of arrays: floating leaves become parameters, under names made of their paths.

    Example:
        An equinox model::

            weights, rest = eqx.partition(model, eqx.is_array)
            module = JaxModule(lambda w, x: jax.vmap(eqx.combine(w, rest))(x), weights)
    """

    def __init__(self, fn: Callable[..., Any], params: Any):
        super().__init__()
        if not callable(fn):
            raise TypeError(f"JaxModule takes a function and a pytree of its parameters; got {type(fn).__name__}")
        self.fn = fn
        self.params = TensorTree(params)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``fn(params, *args, **kwargs)`` over tensors."""
        return call_differentiable(self.fn, (self.params(), *args), kwargs)


__all__ = ["JaxModule", "TensorTree"]
