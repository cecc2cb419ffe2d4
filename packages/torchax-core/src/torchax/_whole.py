"""Composite ops kept whole before autograd, with a backward of their own.

The kernel sits on the autograd key, where torch would take the op apart. It steps aside (the op decomposes) under
functorch transforms and forward-mode AD, under a dispatch mode (which sees the parts, as on CPU), when no lowering's
condition holds, and in a backward that must itself be differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import torch
from torch._C._functorch import peek_interpreter_stack
from torch.utils._pytree import tree_flatten

from ._dispatch import RULES
from ._execute import Program, is_tracing, state
from ._functional import wrap_nest
from ._precision import products
from ._signature import place
from ._twins import functional_twin
from .tensor import Tensor, wrap

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_forward_ad = torch.autograd.forward_ad
_dispatch_modes = torch._C._len_torch_dispatch_stack
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]


def whole_kernel(op: Any) -> Callable[..., Any]:
    """The kernel for `op` on the autograd key of device ``jax``."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        rule = RULES[op]
        if (
            peek_interpreter_stack() is not None
            or _forward_ad._current_level >= 0
            or _dispatch_modes()
            or not hasattr(rule, "resolve_whole")  # its plugin is switched off
        ):
            return op._op_dk(_COMPOSITE, *args, **kwargs)
        key, operands = rule.bind(args, kwargs)
        served = rule.cache.get(key)
        if served is None:
            served = rule.cache[key] = rule.resolve_whole(args, kwargs)
        if served.program is None:  # taken apart, by torch or by a lowering
            return served.apply(args, kwargs)
        if torch.is_grad_enabled():
            tensors = [o for o in operands if type(o) is Tensor]
            if any([t.requires_grad for t in tensors]):
                return _Whole.apply(_Call(op, rule, served, operands), *tensors)
        if served.plain:  # nothing below goes through torch's dispatcher
            return rule.run(served, operands, args, kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return rule.run(served, operands, args, kwargs)

    return kernel


def whole_out_kernel(name: str, overload: Callable[[str], Any]) -> Callable[..., Any]:
    """The kernel for the composite ``out=`` form `name`: its functional op is run, and the results written.

    Torch would take it apart. But parts ask whether views share C++ storage, and some do not write `out` if it is
    a tensor of a subclass.

    Args:
        name: qualified name of the overload.
        overload: what finds the op by its name, which is not done before the first call.
    """
    found: list[Any] = []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if not found:
            op = overload(name)
            found.extend((op, functional_twin(op), [a.name for a in op._schema.arguments if a.is_out]))
        op, twin, outs = found
        if twin is None or peek_interpreter_stack() is not None or _forward_ad._current_level >= 0:
            return op._op_dk(_COMPOSITE, *args, **kwargs)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            results = twin(*args, **{k: v for k, v in kwargs.items() if k not in outs})
            targets = [kwargs[name] for name in outs]
            if any(t.requires_grad for t in tree_flatten((results, targets))[0]):  # torch says what it thinks of that
                return op._op_dk(_COMPOSITE, *args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            result = RULES[op](args, kwargs)
        torch.autograd.graph.increment_version([t for n in outs if not (t := kwargs[n]).is_inference()])
        return result

    return kernel


class _Call:
    """A call of a whole op, less its tensors."""

    __slots__ = ("op", "others", "rule", "served", "single")

    def __init__(self, op: Any, rule: Any, served: Any, operands: list[Any]):
        self.op, self.rule, self.served = op, rule, served
        self.others = [o for o in operands if type(o) is not Tensor]
        self.single = served.single

    def operands(self, tensors: Iterable[Any], others: Iterable[Any]) -> list[Any]:
        """All operands in the order of the signature."""
        tensors, others = iter(tensors), iter(others)
        return [next(tensors) if is_tensor else next(others) for is_tensor in self.served.operand_kinds]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Any:
        served, operands, needs = call.served, call.operands(tensors, call.others), ctx.needs_input_grad[1:]
        ctx.call, ctx.pull = call, None
        try:
            if is_tracing() and served.plain and served.lowering.backward is None and not _saving_hooks(True):
                out, ctx.pull = _traced_forward(call, tensors, needs)
                ctx.executor = state.executor
            else:
                out = call.rule.run(served, operands, (), {})
        except Exception:
            # once more with the arguments, in whose terms the error is; a call that goes well has no use for them
            out = call.rule.run(served, operands, *place(served.template, operands))
        outs = () if not call.served.lowering.saves_result else (out,) if call.single else out
        ctx.save_for_backward(*tensors, *outs)
        ctx.n = len(tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved, call = ctx.saved_tensors, ctx.call
        tensors, outs, needs = saved[: ctx.n], saved[ctx.n :], ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            found = _differentiable(call, tensors, outs, grads, needs)
        elif ctx.pull is not None and ctx.executor is state.executor:
            found = _pulled(call, ctx.pull, tensors, grads, needs)
        else:
            found = _compiled(call, tensors, outs, grads, needs)
        return (None, *found)


_forwards: dict[Any, Program] = {}


def _traced_forward(call: _Call, tensors: Any, needs: tuple[bool, ...]) -> tuple[Any, Any]:
    """The results, and what gives the gradients from what this forward has computed: see `_linearized`.

    So one program has one forward; XLA merges neither kernels nor loops that it finds twice.
    """
    served = call.served
    program = _forwards.get((served, needs))
    if program is None:
        arrange, n = _Call(call.op, call.rule, served, []).operands, len(tensors)

        def run(*operands: Any) -> Any:
            return _linearized(served, arrange, operands[:n], operands[n:], needs)

        program = _forwards[served, needs] = Program(run, str(served.lowering.op), True, served.index)
    out, pull = state.executor.run(program, [*tensors, *call.others])
    return wrap_nest(out, served.metas), pull


def _pulled(call: _Call, pull: Any, tensors: Any, grads: Any, needs: tuple[bool, ...]) -> list[Any]:
    def run(*operands: Any) -> Any:
        given = iter(operands)
        return pull([None if g is None else next(given) for g in grads])

    program = Program(run, f"{call.served.lowering.op}_backward", True, call.served.index)
    found = state.executor.run(program, [g for g in grads if g is not None])
    return [wrap(g, t._m) if need else None for g, t, need in zip(found, tensors, needs, strict=True)]


def _differentiable(call: _Call, tensors: Any, outs: Any, grads: Any, needs: tuple[bool, ...]) -> list[Any]:
    """Through torch's decomposition, so that the gradients have gradients."""
    inputs = [t.view_as(t) if n else t for t, n in zip(tensors, needs, strict=True)]
    others = [
        torch.from_numpy(o) if isinstance(o, np.ndarray) else o for o in call.others
    ]  # CPU tensors that it was given
    args, kwargs = place(call.served.template, call.operands(inputs, others))
    out = call.op._op_dk(_COMPOSITE, *args, **kwargs)
    results = (out,) if call.single else tuple(out)
    wanted = [t for t, n in zip(inputs, needs, strict=True) if n]
    pairs = [(o, g) for o, g in zip(results, grads, strict=True) if g is not None and o.requires_grad]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return [next(found) if n else None for n in needs]


_backwards: dict[Any, Program] = {}


def _compiled(call: _Call, tensors: Any, outs: Any, grads: Any, needs: tuple[bool, ...]) -> list[Any]:
    given = tuple([g is not None for g in grads])
    key = (call.served, needs, given, tuple([g._m for g in grads if g is not None]))
    program = _backwards.get(key)
    if program is None:
        program = _backwards[key] = _backward_program(call, needs, given, len(tensors))
    operands = [*tensors, *outs, *[g for g in grads if g is not None], *call.others]
    values = iter(state.executor.run(program, operands))
    return [wrap(next(values), t._m) if n else None for t, n in zip(tensors, needs, strict=True)]


def _backward_program(call: _Call, needs: tuple[bool, ...], given: tuple[bool, ...], n: int) -> Program:
    """Gradients of the needed tensor arguments from (tensors, [results,] gradients, other operands)."""
    served, lowering, single = call.served, call.served.lowering, call.single
    kept = len(given) if lowering.saves_result else 0
    op, arrange = (
        call.op,
        _Call(call.op, call.rule, served, []).operands,
    )  # the cache must not keep this call's operands

    def run(*operands: Any) -> Any:
        tensors, outs, rest = operands[:n], operands[n : n + kept], list(operands[n + kept :])
        grads = [rest.pop(0) if g else None for g in given]
        if lowering.backward is not None:
            args = _complete(op, *place(served.template, arrange(tensors, rest)))
            result = None if not kept else outs[0] if single else outs
            with products():
                found = lowering.backward(grads[0] if single else grads, args, result, needs)
        else:
            found = _linearized(served, arrange, tensors, rest, needs)[1](grads)
        pairs = zip(found, tensors, needs, strict=True)
        return [
            jax.numpy.zeros_like(t) if g is None else g.astype(t.dtype).reshape(t.shape) for g, t, need in pairs if need
        ]

    return Program(run, f"{lowering.op}_backward", served.program.wide, served.index)


def _linearized(served: Any, arrange: Any, tensors: Any, others: Any, needs: tuple[bool, ...]) -> tuple[Any, Any]:
    """The lowering's raw results, and a function from their gradients (None for zeros) to those of the needed tensors."""
    wanted = [i for i, need in enumerate(needs) if need]

    def forward(*chosen: Any) -> Any:
        everything = list(tensors)
        for i, x in zip(wanted, chosen, strict=True):
            everything[i] = x
        return served.apply(*place(served.template, arrange(everything, others)))

    out, vjp = jax.vjp(forward, *[tensors[i] for i in wanted])
    leaves = [out] if served.single else list(out)

    def pull(grads: Any) -> list[Any]:
        # torch's gradient of a complex number is the conjugate of JAX's
        cotangents = [
            jax.numpy.zeros_like(o) if g is None else g.astype(o.dtype).conj()
            for o, g in zip(leaves, grads, strict=True)
        ]
        computed = iter([g.conj() for g in vjp(cotangents[0] if served.single else type(out)(cotangents))])
        return [next(computed) if need else None for need in needs]

    return out, pull


def _complete(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments in the order of the schema, defaults included."""
    rest = op._schema.arguments[len(args) :]
    return (*args, *(kwargs.get(a.name, a.default_value) for a in rest))
