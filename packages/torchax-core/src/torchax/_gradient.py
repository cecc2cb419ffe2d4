"""A lowering with a gradient of its own, for those who differentiate it with JAX: `Lowering.grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def with_gradient(fn: Callable[..., Any], grad: Callable[..., Any], func: Any) -> Callable[..., Any]:
    """`fn` as JAX differentiates it by `grad`, which is ``grad(cotangents, args, result, needs)``.

    Args:
        fn: the lowering.
        grad: gives the cotangents of the tensor arguments in order, None for what is not needed: from the cotangent of the
            result (a tuple of them for several results), all arguments in the order of the schema, the result, and for
            each tensor argument whether its dtype has gradients.
        func: the op.
    """
    schema = func._schema.arguments
    tensors = {a.name for a in schema if "Tensor" in str(a.type)}

    def call(*args: Any, **kwargs: Any) -> Any:
        named = {a.name: x for a, x in zip(schema, args, strict=False)} | kwargs
        leaves, tree = jax.tree.flatten([x for name, x in named.items() if name in tensors])

        def complete(leaves: Any) -> dict[str, Any]:
            given = iter(tree.unflatten(leaves))
            return {name: next(given) if name in tensors else x for name, x in named.items()}

        @jax.custom_vjp
        def primal(*leaves: Any) -> Any:
            now = complete(leaves)
            return fn(*list(now.values())[: len(args)], **{name: now[name] for name in kwargs})

        def forward(*leaves: Any) -> tuple[Any, Any]:
            result = primal(*leaves)
            return result, (leaves, result)

        def backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
            leaves, result = saved
            now = complete(leaves)
            everything = tuple(now.get(a.name, a.default_value) for a in schema)
            needs = tuple(jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves)
            found = grad(cotangents, everything, result, needs)
            return tuple(
                None if g is None or not need else g.astype(x.dtype)
                for g, x, need in zip(found, leaves, needs, strict=True)
            )

        primal.defvjp(forward, backward)
        return primal(*leaves)

    return call
