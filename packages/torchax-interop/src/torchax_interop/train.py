"""`make_train_step`: a training step out of a model, a loss and an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
import torch
from jax.sharding import PartitionSpec

from ._mesh import constrained_around
from .autograd import transformed
from .compile import compile
from .optimizer import OptaxOptimizer
from .transforms import gradient_checkpoint, jax_value_and_grad
from .views import call_jax


def make_train_step(
    model: Any,
    loss: Callable[..., Any],
    optimizer: Any,
    remat_policy: Callable[..., bool] | None = None,
    mark_fsdp_sharding_axis: str | None = None,
    frozen_params_filter: Callable[[str, Any], bool] | None = None,
) -> Callable[..., Any]:
    """A training step as one function.

    Args:
        model: a `torch.nn.Module`, or a function ``(weights, buffers, args) -> result`` over nests of tensors.
        loss: ``(result, target) -> loss``, a 0-d tensor.
        optimizer: an optax transform, or for a module a `torch.optim.Optimizer` over its parameters.
        remat_policy: what the forward keeps for the backward, as for `jax.checkpoint`
            (`jax.checkpoint_policies`); the rest is computed again. None keeps everything. JAX differentiates then.
        mark_fsdp_sharding_axis: for a function: the axis of the mesh around the call over which arguments, target and result
            are divided in their first dimension.
        frozen_params_filter: for a function: ``(name, weight) -> bool``, true of weights that stay as they are. ``opt_state``
            is the transform's ``init`` on the others.

    Returns:
        For a module ``step(inputs, target) -> loss``, compiled: it updates the module's parameters and buffers and the
        optimizer, ``step.optimizer`` (an `OptaxOptimizer` for a transform). A tuple of inputs is given to the module as
        positional arguments, a dict as keywords.

        For a function ``step(weights, buffers, opt_state, args, target) -> (loss, weights, opt_state)``, not compiled, to be
        used under `torchax.interop.jax_jit`; ``opt_state`` is the transform's ``init`` on the weights as arrays.
    """
    if isinstance(model, torch.nn.Module):
        if mark_fsdp_sharding_axis is not None or frozen_params_filter is not None:
            raise TypeError(
                "mark_fsdp_sharding_axis and frozen_params_filter are for functions of weights; of a module, shard the inputs with "
                "torchax.interop.shard_batch, and freeze parameters with requires_grad_(False)"
            )
        return _step_of_module(model, loss, optimizer, remat_policy)
    if not callable(model):
        raise TypeError(f"make_train_step takes a torch.nn.Module or a function; got {type(model).__name__}")
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "a torch.optim.Optimizer changes parameters in place: give the module itself, or an optax transform"
        )
    return _step_of_function(model, loss, optimizer, remat_policy, mark_fsdp_sharding_axis, frozen_params_filter)


def _step_of_module(model: torch.nn.Module, loss: Any, optimizer: Any, policy: Any) -> Callable[..., Any]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = OptaxOptimizer(trainable, optimizer)

    def forward(inputs: Any, target: Any) -> torch.Tensor:
        return loss(_called(model, {}, inputs), target)

    def kept_by_policy(inputs: Any, target: Any) -> torch.Tensor:
        def pure(buffers: dict[str, Any], inputs: Any, target: Any) -> Any:
            return loss(_called(model, buffers, inputs), target), buffers

        buffers = {name: b.clone() for name, b in model.named_buffers()}
        run = transformed(lambda f: jax.checkpoint(f, policy=policy), pure)
        value, after = run(buffers, inputs, target)
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(after[name])
        return value

    @compile
    def step(inputs: Any, target: Any) -> torch.Tensor:
        optimizer.zero_grad()
        value = forward(inputs, target) if policy is None else kept_by_policy(inputs, target)
        value.backward()
        optimizer.step()
        return value.detach()

    step.optimizer = optimizer
    return step


def _called(model: torch.nn.Module, buffers: dict[str, Any], inputs: Any) -> Any:
    args, kwargs = (
        ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    return torch.func.functional_call(model, buffers, args, kwargs) if buffers else model(*args, **kwargs)


def _step_of_function(
    model: Any, loss: Any, tx: Any, policy: Any, axis: str | None, frozen: Callable[[str, Any], bool] | None
) -> Callable[..., Any]:
    def divided(nest: Any) -> Any:
        if axis is None:
            return nest
        constrain = lambda a: constrained_around(a, PartitionSpec(axis)) if a.ndim else a
        return call_jax(lambda nest: jax.tree.map(constrain, nest), nest)

    def value(weights: Any, fixed: Any, buffers: Any, args: Any, target: Any) -> Any:
        weights = {**weights, **fixed} if fixed else weights
        return loss(divided(model(weights, buffers, divided(args))), divided(target))

    differentiated = jax_value_and_grad(value if policy is None else gradient_checkpoint(value, policy=policy))

    def step(weights: Any, buffers: Any, opt_state: Any, args: Any, target: Any) -> Any:
        fixed = {} if frozen is None else {name: w for name, w in weights.items() if frozen(name, w)}
        trained = {name: w for name, w in weights.items() if name not in fixed} if fixed else weights
        found, grads = differentiated(trained, fixed, buffers, args, target)
        with torch.no_grad():
            updates, opt_state = call_jax(tx.update, grads, opt_state, trained)
            updated = call_jax(optax.apply_updates, trained, updates)
            if fixed:
                updated = {name: fixed[name] if name in fixed else updated[name] for name in weights}
            return found, updated, opt_state

    return step


__all__ = ["make_train_step"]
