"""`jax_view`, `torch_view`: a function, a module or a value of one world as seen from the other; `call_jax`, `call_torch`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torchax import dtypes
from torchax.tensor import Tensor

from ._enter import enter, to_array, to_tensor
from ._tree import tree_map
from .autograd import call_differentiable


def jax_view(x: Any) -> Any:
    """A torch object as JAX sees it.

    Args:
        x: a torch function or module: gives a function of nests of `jax.Array`s, for use with and without `jax.jit`,
            `jax.grad`, `jax.vmap`. A tensor: its `jax.Array` (no copy on device ``jax``). A `torch.dtype`: the numpy
            dtype. A nest of these: the nest. Anything else is given back as it is.
    """
    if isinstance(x, torch.Tensor):
        return to_array(x)
    if isinstance(x, torch.dtype):
        return dtypes.to_jax(x)
    if _is_function(x):
        return _wrapped(x, lambda *args, **kwargs: enter(x, args, kwargs))
    return tree_map(lambda leaf: leaf if leaf is x else jax_view(leaf), x)


def torch_view(x: Any) -> Any:
    """A JAX object as torch sees it.

    Args:
        x: a JAX function: gives a function of nests of tensors, through which torch's autograd goes. A `jax.Array`: a
            tensor on device ``jax`` that holds it. A numpy dtype: the `torch.dtype`. A nest of these: the nest. Anything
            else is given back as it is.
    """
    if isinstance(x, jax.Array):
        return to_tensor(x)
    if isinstance(x, np.dtype) or (isinstance(x, type) and issubclass(x, np.generic)):
        return dtypes.to_torch(np.dtype(x))
    if _is_function(x):
        return _wrapped(x, lambda *args, **kwargs: call_jax(x, *args, **kwargs))
    return tree_map(lambda leaf: leaf if leaf is x else torch_view(leaf), x)


def call_jax(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a JAX function with nests of tensors; gives nests of tensors. Gradients go through where inputs require them."""
    return call_differentiable(fn, args, kwargs)


def call_torch(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a torch function or module with nests of `jax.Array`s; gives nests of `jax.Array`s."""
    return enter(fn, args, kwargs)


def shard_map(
    fn: Callable[..., Any], *, mesh: Any = None, in_specs: Any = None, out_specs: Any, **options: Any
) -> Callable[..., Any]:
    """`jax.shard_map` of a torch function: each device runs it on its part of the tensors.

    Args:
        fn: takes and gives nests of tensors, the parts.
        mesh: the `jax.sharding.Mesh`; the ambient one if None.
        in_specs: a nest of `PartitionSpec`s for the arguments.
        out_specs: the same for the results.
        options: as for `jax.shard_map`.
    """
    if mesh is not None:
        options["mesh"] = mesh
    if in_specs is not None:
        options["in_specs"] = in_specs
    return torch_view(jax.shard_map(jax_view(fn), out_specs=out_specs, **options))


def _is_function(x: Any) -> bool:
    return (
        callable(x)
        and not isinstance(x, (torch.Tensor, jax.Array))
        and not (isinstance(x, type) and issubclass(x, Tensor))
    )


def _wrapped(x: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(x, torch.nn.Module):
        call.__name__, call.__wrapped__ = type(x).__name__, x  # type: ignore[attr-defined]
        return call
    try:
        return functools.wraps(x)(call)
    except (AttributeError, TypeError):
        return call


__all__ = ["call_jax", "call_torch", "jax_view", "shard_map", "torch_view"]
