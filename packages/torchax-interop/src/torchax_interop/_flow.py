"""Control flow as a node of torch's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from torchax._execute import state
from torchax._storage import TensorMeta
from torchax.tensor import wrap

from ._groups import dense
from ._operands import map_tensors
from ._recording import NotDifferentiable
from ._regions import Scope, conj
from .autograd import j2t_autograd


def differentiable_by(tensors: Sequence[Any], scope: Scope) -> bool:
    return torch.is_grad_enabled() and (bool(scope.leaves) or any(t.requires_grad for t in tensors))


class _Call:
    """A function of arrays to be called, and what of it a tensor can have a gradient by."""

    def __init__(self, run: Any, world: list[Any], outs: list[tuple[TensorMeta, bool]], tensors: Sequence[Any]):
        self.run, self.world, self.outs = run, world, outs
        self.wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
        self.chosen = [i for i, (_, g) in enumerate(outs) if g]
        self.states: list[Any] = []

    def differentiated(self, arrays: Sequence[Any]) -> Callable[..., Any]:
        """(wanted inputs) -> (chosen results, (other results, states))."""

        def run(*chosen: Any) -> Any:
            full = list(arrays)
            for i, x in zip(self.wanted, chosen, strict=True):
                full[i] = x
            outs = self.run(*full, *self.world)
            return [outs[i] for i in self.chosen], outs

        return run


def flow(
    run: Any, tensors: Sequence[Any], scope: Scope, outs: list[tuple[TensorMeta, bool]], differentiable: bool
) -> list[Any]:
    """Call ``run(*tensors, *leaves, *states)``; written states are stored, the results are tensors."""
    world = scope.states()
    tensors = [*tensors, *scope.leaves]
    with jax.enable_x64(True):
        if differentiable and any(g for _, g in outs):
            call = _Call(run, world, outs, tensors)
            found = list(Flow.apply(call, *tensors))
            states = call.states
        else:
            values = run(*[state.executor.read(t) for t in tensors], *world)
            found = [wrap(v, m) for v, (m, _) in zip(values[: len(outs)], outs, strict=True)]
            states = values[len(outs) :]
    for storage, value in zip(scope.written, states, strict=True):
        state.executor.store(storage, value)
    return found


class Flow(torch.autograd.Function):
    """Control flow as a node of torch's graph; JAX differentiates it at once, so that nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Any:  # type: ignore[override]
        arrays = [state.executor.read(t) for t in tensors]
        _, ctx.vjp, outs = jax.vjp(call.differentiated(arrays), *[arrays[i] for i in call.wanted], has_aux=True)
        call.states = outs[len(call.outs) :]
        ctx.call, ctx.n, ctx.arrays = call, len(tensors), arrays
        ctx.save_for_backward(*[tensors[i] for i in call.wanted])
        results = [wrap(v, m) for v, (m, _) in zip(outs[: len(call.outs)], call.outs, strict=True)]
        ctx.mark_non_differentiable(*[t for t, (_, g) in zip(results, call.outs, strict=True) if not g])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        call = ctx.call
        given = [grads[i] for i in call.chosen]
        if torch.is_grad_enabled():

            def again(chosen: list[Any], cotangents: list[Any]) -> Any:
                _, vjp, _ = jax.vjp(call.differentiated(ctx.arrays), *chosen, has_aux=True)
                return [conj(g) for g in vjp([conj(c) for c in cotangents])]

            found = j2t_autograd(again)(list(ctx.saved_tensors), given)
        else:
            with jax.enable_x64(True):
                found = [conj(g) for g in ctx.vjp([conj(state.executor.read(g)) for g in given])]
            found = [wrap(g, dense(t._m)) for g, t in zip(found, ctx.saved_tensors, strict=True)]
        result: list[Any] = [None] * (ctx.n + 1)
        for i, g in zip(call.wanted, found, strict=True):
            result[i + 1] = g
        return tuple(result)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, *roots: Any) -> Any:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:  # type: ignore[override]
        raise NotDifferentiable(
            "torch.while_loop has no gradient: the number of its turns is not known beforehand. Use "
            "torch._higher_order_ops.scan for a known number of turns, or call it under torch.no_grad()"
        )


def without_gradient(results: Any, roots: Sequence[torch.Tensor]) -> Any:
    """`results`, which depend on `roots` in a way that has no gradient: asking for it raises an exception."""
    return map_tensors(lambda t: _NoGradient.apply(t, *roots) if t.is_floating_point() else t, results)
