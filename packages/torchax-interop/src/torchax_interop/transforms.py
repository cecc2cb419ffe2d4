"""Torch functions transformed by JAX: `t2j_autograd`, `jax_value_and_grad`, `jax_vmap`, `gradient_checkpoint`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.utils.checkpoint
from torchax import random as _random
from torchax._execute import state
from torchax._storage import dense_meta
from torchax.tensor import Tensor, wrap

from ._enter import Entered, enter, to_array, to_tensor
from ._tree import flatten, tree_map, unflatten
from .autograd import in_64_bit, transformed


def t2j_autograd(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A torch function as a JAX function whose gradient is torch's own backward.

    `jax_view` lets JAX differentiate what the torch function computed; this keeps custom `torch.autograd.Function`s and
    `torch.no_grad` regions. The backward runs the forward again, and is itself such a function: second derivatives are
    torch's double backward.

    Args:
        fn: takes and gives nests of tensors, positionally.
    """

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return enter(fn, args, {})

    def forward(*args: Any) -> Any:
        return enter(fn, args, {}), args

    def backward(args: Any, cotangents: Any) -> Any:
        given = [x for x in jax.tree.leaves(cotangents) if x.dtype != jax.dtypes.float0]
        leaves: list[Any] = []
        spec = flatten(args, leaves)
        grads = iter(t2j_autograd(functools.partial(_torch_backward, fn))(args, given))
        floats = [isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
        zeros = lambda x: np.zeros(np.shape(x), jax.dtypes.float0)
        return unflatten(spec, iter([next(grads) if f else zeros(x) for f, x in zip(floats, leaves, strict=True)]))

    call.defvjp(forward, backward)
    return functools.wraps(fn)(lambda *args: call(*args)) if hasattr(fn, "__name__") else call


def _torch_backward(fn: Callable[..., Any], args: Any, cotangents: list[Any]) -> list[Any]:
    """Gradients of the floating leaves of `args`, given cotangents for the floating results."""
    leaves: list[Any] = []
    spec = flatten(args, leaves)
    again = any(isinstance(x, torch.Tensor) and x.requires_grad for x in (*leaves, *cotangents))
    inputs = [_as_input(x) for x in leaves]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    with torch.enable_grad():
        outs: list[Any] = []
        flatten(fn(*unflatten(spec, iter(inputs))), outs)
    outs = [o for o in outs if isinstance(o, torch.Tensor) and (o.is_floating_point() or o.is_complex())]
    pairs = [(o, g) for o, g in zip(outs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in wanted]
    with torch.set_grad_enabled(again):
        # jax and torch disagree about the gradient of complex numbers by a conjugate
        given = [g.conj() if g.is_complex() else g for _, g in pairs]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, given, allow_unused=True, create_graph=again)
        found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
        return [g.conj() if g.is_complex() else g for g in found]


def _as_input(x: Any) -> Any:
    """A leaf to differentiate by; one that is being differentiated by already stays."""
    if not isinstance(x, torch.Tensor) or not (x.is_floating_point() or x.is_complex()) or x.requires_grad:
        return x
    return x.detach().requires_grad_()


def jax_value_and_grad(
    fn: Callable[..., Any], kwargs_for_value_and_grad: dict[str, Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """`jax.value_and_grad` of a torch function: tensors in, value and gradients (tensors in the nest of the argument) out.

    Args:
        fn: gives a 0-d tensor, the loss; JAX differentiates it.
        kwargs_for_value_and_grad: ``argnums``, ``has_aux``, ... as for `jax.value_and_grad`; also as keywords.
        options: see there.
    """
    transformed = jax.value_and_grad(
        functools.partial(_entered, fn), **{**(kwargs_for_value_and_grad or {}), **options}
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves: list[Any] = []
        spec = flatten((args, kwargs), leaves)
        a, k = unflatten(spec, iter([to_array(x) for x in leaves]))
        with torch.no_grad(), in_64_bit(leaves):
            return tree_map(to_tensor, transformed(*a, **k))

    return functools.wraps(fn)(call) if hasattr(fn, "__name__") else call


def _entered(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return enter(fn, args, kwargs)


def gradient_checkpoint(
    fn: Callable[..., Any], kwargs: dict[str, Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """`jax.checkpoint` of a torch function or module: what it computes is not kept for the backward but computed again.

    Under JAX's differentiation (inside `jax_view`) it is `jax.checkpoint`, with its options. Under torch's autograd,
    eagerly and in `torchax.compile`, gradients also reach the parameters that the function uses without being given them.

    Args:
        fn: takes and gives nests of tensors.
        kwargs: options of `jax.checkpoint` (``policy``, ``prevent_cse``, ``static_argnums``), for JAX's differentiation.
        options: the same.
    """
    through_jax = jax.checkpoint(functools.partial(_entered, fn), **{**(kwargs or {}), **options})

    def call(*args: Any, **keywords: Any) -> Any:
        if isinstance(state.executor, Entered):
            leaves: list[Any] = []
            spec = flatten((args, keywords), leaves)
            a, k = unflatten(spec, iter([to_array(x) for x in leaves]))
            return tree_map(to_tensor, through_jax(*a, **k))
        if not torch.is_grad_enabled():
            return fn(*args, **keywords)
        run = _Recomputed(fn)
        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **keywords)

    if isinstance(fn, torch.nn.Module):
        return call
    return functools.wraps(fn)(call) if hasattr(fn, "__name__") else call


class _Recomputed:
    """A function that runs once forward, and again in the backward on the same random numbers.

    The second time its inputs pass a barrier, so that XLA does not recognise the first computation and keep it after all.
    """

    def __init__(self, fn: Callable[..., Any]):
        self.fn, self.again, self.rng = fn, False, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        source, executor = _random.default(0), state.executor
        before = executor.load(source.storage)
        if not self.again:
            self.again, self.rng = True, before
            return self.fn(*args, **kwargs)
        executor.store(source.storage, self.rng)
        try:
            args, kwargs = tree_map(_barrier, (args, kwargs))
            return self.fn(*args, **kwargs)
        finally:
            executor.store(source.storage, before)


class _Barrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:  # type: ignore[override]
        value = jax.lax.optimization_barrier(to_array(x))
        return wrap(value, x._m if x._m.contiguous else dense_meta(x._m.shape, x._m.dtype, x._m.index))

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:  # type: ignore[override]
        return g


def _barrier(x: Any) -> Any:
    if type(x) is not Tensor or state.executor.owner is None:
        return x
    return _Barrier.apply(x)


def jax_vmap(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """`jax.vmap` of a torch function: takes and gives tensors.

    Gradients go through, also to parameters that the function uses without being given them.

    Args:
        fn: takes and gives nests of tensors.
        args: ``in_axes``, ``out_axes``, ... as for `jax.vmap`.
        kwargs: the same as keywords.
    """
    call = transformed(lambda f: jax.vmap(f, *args, **kwargs), fn)
    return functools.wraps(fn)(call) if hasattr(fn, "__name__") else call


__all__ = ["gradient_checkpoint", "jax_value_and_grad", "jax_vmap", "t2j_autograd"]
