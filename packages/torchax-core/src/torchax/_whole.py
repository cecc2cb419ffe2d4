"""Composite ops kept whole before autograd, with a backward of their own.

The kernel sits on the autograd key, where torch would take the op apart. It steps aside (the op decomposes) under
functorch transforms and forward-mode AD, when no lowering's condition holds, and in a backward that must itself be
differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._dispatch import RULES
from ._execute import Program, state
from ._signature import place
from .tensor import Tensor, wrap

_FORWARD_AD = torch.autograd.forward_ad


def whole_kernel(op: Any) -> Callable[..., Any]:
    """The kernel for `op` on the autograd key of device ``jax``."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None or _FORWARD_AD._current_level >= 0:
            return op._op_dk(composite, *args, **kwargs)
        rule = RULES[op]
        if not hasattr(rule, "resolve_whole"):  # its plugin is switched off
            return op._op_dk(composite, *args, **kwargs)
        key, _ = rule.signature.bind(args, kwargs)
        served = rule.cache.get(key)
        if served is None:
            served = rule.cache[key] = rule.resolve_whole(args, kwargs)
        if served.program is None:
            return op._op_dk(composite, *args, **kwargs)
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in _leaves(args, kwargs)):
            flat, spec = tree_flatten((args, kwargs))
            return _Whole.apply(op, served, spec, *flat)
        with torch._C._AutoDispatchBelowAutograd():
            return rule(args, kwargs)

    return kernel


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    flat = []
    for x in (*args, *kwargs.values()):
        flat.extend(x) if isinstance(x, list | tuple) else flat.append(x)
    return flat


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, served: Any, spec: Any, *flat: Any) -> Any:
        args, kwargs = tree_unflatten(list(flat), spec)
        out = RULES[op](args, kwargs)
        ctx.op, ctx.served, ctx.spec = op, served, spec
        ctx.where = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor)]
        ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in flat]
        ctx.single = not isinstance(out, tuple | list)
        outs = (out,) if ctx.single else tuple(out)
        ctx.n_outs = len(outs)
        keep = served.lowering.backward is not None
        ctx.save_for_backward(*[flat[i] for i in ctx.where], *(outs if keep else ()))
        return out if ctx.single else outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        tensors, outs = saved[: len(ctx.where)], saved[len(ctx.where) :]
        needs = [ctx.needs_input_grad[3 + i] for i in ctx.where]
        if torch.is_grad_enabled():
            found = _differentiable(ctx, tensors, grads, needs)
        else:
            found = _compiled(ctx, tensors, outs, grads, needs)
        result: list[Any] = [None] * (3 + len(ctx.rest))
        for i, g in zip(ctx.where, found, strict=True):
            result[3 + i] = g
        return tuple(result)


def _differentiable(ctx: Any, tensors: Any, grads: Any, needs: list[bool]) -> list[Any]:
    """Through torch's decomposition, so that the gradients have gradients."""
    flat = list(ctx.rest)
    inputs = [t if not n else t.view_as(t) for t, n in zip(tensors, needs, strict=True)]
    for i, t in zip(ctx.where, inputs, strict=True):
        flat[i] = t
    args, kwargs = tree_unflatten(flat, ctx.spec)
    out = ctx.op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    outs = (out,) if ctx.single else tuple(out)
    wanted = [t for t, n in zip(inputs, needs, strict=True) if n]
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True))
    return [next(found) if n else None for n in needs]


_backwards: dict[Any, Program] = {}


def _compiled(ctx: Any, tensors: Any, outs: Any, grads: Any, needs: list[bool]) -> list[Any]:
    served = ctx.served
    given = [g is not None for g in grads]
    key = (served, tuple(needs), tuple(given))
    program = _backwards.get(key)
    if program is None:
        program = _backwards[key] = _backward_program(served, needs, given, ctx.single, len(tensors))
    operands = [*tensors, *outs, *[g for g in grads if g is not None]]
    _, numbers = RULES[ctx.op].signature.bind(*_rebuilt(ctx, tensors))
    operands += [x for x in numbers if type(x) is not Tensor]
    values = iter(state.executor.run(program, operands))
    return [wrap(next(values), t._m) if n else None for t, n in zip(tensors, needs, strict=True)]


def _rebuilt(ctx: Any, tensors: Any) -> Any:
    flat = list(ctx.rest)
    for i, t in zip(ctx.where, tensors, strict=True):
        flat[i] = t
    return tree_unflatten(flat, ctx.spec)


def _backward_program(served: Any, needs: list[bool], given: list[bool], single: bool, n: int) -> Program:
    """Gradients of the needed tensor arguments from (tensors, [results,] gradients, other operands)."""
    lowering, n_outs = served.lowering, len(given)
    kept = n_outs if lowering.backward is not None else 0

    def call(tensors: Any, numbers: Any) -> Any:
        tensors, numbers = iter(tensors), iter(numbers)
        operands = [next(tensors) if is_tensor else next(numbers) for is_tensor in served.operand_kinds]
        return place(served.template, operands)

    def run(*operands: Any) -> Any:
        tensors, outs, rest = operands[:n], operands[n : n + kept], list(operands[n + kept :])
        grads = [rest.pop(0) if g else None for g in given]
        args, kwargs = call(tensors, rest)
        if lowering.backward is not None:
            found = lowering.backward(grads[0] if single else grads, (*args, *kwargs.values()), outs[0] if single else outs, tuple(needs))
        else:
            wanted = [i for i, need in enumerate(needs) if need]

            def forward(*chosen: Any) -> Any:
                everything = list(tensors)
                for i, x in zip(wanted, chosen, strict=True):
                    everything[i] = x
                return served.apply(*call(everything, rest))

            out, vjp = jax.vjp(forward, *[tensors[i] for i in wanted])
            leaves = [out] if single else list(out)
            cotangents = [jax.numpy.zeros_like(o) if g is None else g.astype(o.dtype) for o, g in zip(leaves, grads, strict=True)]
            computed = iter(vjp(cotangents[0] if single else type(out)(cotangents)))
            found = [next(computed) if need else None for need in needs]
        pairs = zip(found, tensors, needs, strict=True)
        return [jax.numpy.zeros_like(t) if g is None else g.astype(t.dtype).reshape(t.shape) for g, t, need in pairs if need]

    return Program(run, f"{lowering.op}_backward", True)


