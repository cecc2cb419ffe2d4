"""`register_jax`: what a `torch.library` operator does on device ``jax``, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef
from torchax._registry import REGISTRY, Lowering, op_name
from torchax.tensor import Tensor

from ._tree import flatten, unflatten
from .autograd import JaxCall, j2t_autograd, vjp_of


def register_jax(
    op: Any, fn: Callable[..., Any] | None = None, *, gradient: bool | None = None, **attributes: Any
) -> Any:
    """Give a custom operator a JAX implementation, eagerly, in compiled functions and under JAX's transformations.

    Where the operator has no gradient of its own (``register_autograd``), it gets the one that JAX derives from `fn`
    (`jax.vjp`), second derivatives included. Without a ``register_fake`` the shapes and dtypes are those that `fn` gives.

    Args:
        op: what `torch.library.custom_op` made, an overload (``torch.ops.mylib.op.default``), or its name (``"mylib::op"``).
        fn: takes the operator's arguments, `jax.Array`s in place of tensors, and gives its results. Of an operator with
            ``mutates_args``, it gives the new values of those arguments after the results. None gives a decorator.
        gradient: True: JAX's, also in place of the operator's own; False: none is registered; None: JAX's if it has none.
        attributes: of `torchax.ops.Lowering`, ``platforms=("tpu",)`` say.

    Returns:
        `fn`.

    Raises:
        ValueError: there is no such operator, or a gradient was asked for of one that mutates arguments.
    """
    if fn is None:
        return lambda f: register_jax(op, f, gradient=gradient, **attributes)
    overload = _overload(op)
    written = tuple(a.name for a in overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    if gradient and written:
        raise ValueError(f"{op_name(overload)} mutates {', '.join(written)}: such an operator cannot have a gradient")
    if written:
        attributes = {"kind": "stateful", "writes": written, **attributes}
    known = len(REGISTRY.lowerings(overload))
    REGISTRY.add(
        Lowering(
            op=op_name(overload),
            fn=fn,
            **{"provider": f"register_jax {known}", "priority": known, "meta": _has_fake(op, overload), **attributes},
        )
    )
    if gradient or (gradient is None and not written and not _has_gradient(op, overload)):
        _register_gradient(op, overload, fn)
    return fn


def _overload(op: Any) -> Any:
    if isinstance(op, CustomOpDef):
        return op._opoverload
    if isinstance(op, str):
        namespace, _, rest = op.partition("::")
        packet, _, overload = rest.partition(".")
        try:
            return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        except AttributeError:
            raise ValueError(f"there is no operator {op!r}; define it with torch.library.custom_op first") from None
    if isinstance(op, torch._ops.OpOverloadPacket):
        return op.default
    if isinstance(op, torch._ops.OpOverload):
        return op
    raise TypeError(
        f"register_jax takes what torch.library.custom_op made, an overload or its name; got {type(op).__name__}"
    )


def _definition(op: Any, overload: Any) -> Any:
    from torch._library.custom_ops import OPDEFS

    return op if isinstance(op, CustomOpDef) else OPDEFS.get(overload._schema.name)


def _has_fake(op: Any, overload: Any) -> bool:
    definition = _definition(op, overload)
    if definition is not None:
        return definition._abstract_fn is not None
    return any(_has_kernel(overload, key) for key in ("Meta", "CompositeExplicitAutograd", "CompositeImplicitAutograd"))


def _has_gradient(op: Any, overload: Any) -> bool:
    definition = _definition(op, overload)
    return definition._backward_fn is not None if definition is not None else _has_kernel(overload, "Autograd")


def _has_kernel(overload: Any, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key)


def _register_gradient(op: Any, overload: Any, fn: Callable[..., Any]) -> None:
    name = op_name(overload)
    named = [a.name for a in overload._schema.arguments if a.kwarg_only]

    def save(ctx: Any, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
        leaves: list[Any] = []
        ctx.spec = flatten((tuple(inputs), dict(keywords)), leaves)
        ctx.where = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        ctx.leaves = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        ctx.save_for_backward(*[leaves[i] for i in ctx.where])
        outs: list[Any] = []
        flatten(output, outs)
        ctx.out_kinds = [_continuous(t) for t in outs if isinstance(t, torch.Tensor)]

    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = ctx.saved_tensors
        if not all(type(t) is Tensor for t in tensors):
            raise RuntimeError(
                f"the gradient of {name} is JAX's and serves tensors on device 'jax' alone; give others one with register_autograd"
            )
        wanted = [i for i, t in enumerate(tensors) if _continuous(t)]
        flat: list[Any] = []
        flatten(grads, flat)
        given = [g for g, kind in zip(flat, ctx.out_kinds, strict=True) if kind]
        call = JaxCall(fn, ctx.spec, ctx.leaves, ctx.where)
        found = j2t_autograd(vjp_of(call, wanted, ctx.out_kinds))(list(tensors), given)
        leaves: list[Any] = [None] * len(ctx.leaves)
        for i, g in zip(wanted, found, strict=True):
            leaves[ctx.where[i]] = g
        positional, _ = unflatten(ctx.spec, iter(leaves))
        return positional if len(positional) != 1 else positional[0]

    if named:
        setup: Any = lambda ctx, inputs, keyword_only_inputs, output: save(ctx, inputs, keyword_only_inputs, output)
    else:
        setup = lambda ctx, inputs, output: save(ctx, inputs, {}, output)
    definition = _definition(op, overload)
    if definition is not None:
        definition.register_autograd(backward, setup_context=setup)
    else:
        torch.library.register_autograd(overload.name(), backward, setup_context=setup)


def _continuous(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


__all__ = ["register_jax"]
