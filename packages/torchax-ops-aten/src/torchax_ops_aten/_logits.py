"""Losses and gradients from the logits of a linear layer, which exist for a block of rows at a time.

Per row, with target t, logits l = W x + b, scale a and (for smoothing) e, class weights w:
``a (logsumexp(l) - l[t]) + e sum_c w[c] (logsumexp(l) - l[c])``. Its gradient with respect to l is
``softmax(l) (a + e sum(w)) - a onehot(t) - e w``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from torchax.ops import batch_parts, divided

from ._common import accumulator, wide

# A block has as many rows on each device as these allow. Fewer make the products wait for the gradient of the weights, which each block
# reads and writes: on TPU the arithmetic of 1,024 rows takes about as long. Where classes are few, larger blocks are free.
_ROWS = 1024
_LOGITS = 2**26


class Rows(NamedTuple):
    """What belongs to each row: ``x [N, K]``, the others ``[N]``; `target` is in range, `smooth` and `grad` may be None."""

    x: Any
    target: Any
    counts: Any
    scale: Any
    smooth: Any = None
    grad: Any = None


class Layer(NamedTuple):
    """``weight [C, K]``, ``bias [C]`` or None, and `counts` ``[C]``, how much a class counts, or None for 1."""

    weight: Any
    bias: Any
    counts: Any


def total_loss(rows: Rows, layer: Layer, size: int = 0) -> jax.Array:
    """The sum of the rows' losses.

    The forward computes the gradients, too, while the logits of a block are at hand, if they are wanted; the backward scales them.

    Args:
        rows: without `grad`.
        layer: x, weight and bias get gradients.
        size: rows of a block; 0 for a choice by the number of classes.
    """

    @jax.custom_vjp
    def total(operands: Any, rest: Any) -> Any:
        return jnp.sum(_walk(*_put(operands, rest), size)[0])

    def forward(operands: Any, rest: Any) -> Any:
        (values, needs), rest = _perturbed(operands), _values(rest)
        losses, gradients = _walk(*_put(values, rest), size, needs)
        # Held until the backward, so in the operands' dtypes; float16 would lose what is small before it is scaled.
        kept = [
            g if g is None or v.dtype == np.float16 else g.astype(v.dtype)
            for g, v in zip(gradients, values, strict=True)
        ]
        return jnp.sum(losses), (kept, [v if v is None else v[:0] for v in values])

    def backward(saved: Any, grad: Any) -> Any:
        if isinstance(grad, jax.custom_derivatives.SymbolicZero):
            return None, None
        return tuple(None if g is None else (wide(g) * grad).astype(v.dtype) for g, v in zip(*saved, strict=True)), None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(*_taken(rows, layer))


def losses_of_rows(rows: Rows, layer: Layer, size: int = 0) -> jax.Array:
    """The loss of each row, ``[N]``. The backward, which knows the gradient of each, computes the logits once more.

    Args:
        rows: without `grad`.
        layer: x, weight and bias get gradients.
        size: rows of a block; 0 for a choice by the number of classes.
    """

    @jax.custom_vjp
    def losses(operands: Any, rest: Any) -> Any:
        return _walk(*_put(operands, rest), size)[0]

    def forward(operands: Any, rest: Any) -> Any:
        (values, needs), rest = _perturbed(operands), _values(rest)
        return losses(values, rest), (values, rest, [() if need else None for need in needs])

    def backward(saved: Any, grad: Any) -> Any:
        values, rest, needs = saved
        if isinstance(grad, jax.custom_derivatives.SymbolicZero):
            return None, None
        given, layer = _put(values, rest)
        gradients = _walk(given._replace(grad=grad), layer, size, [n is not None for n in needs])[1]
        return tuple(None if g is None else g.astype(v.dtype) for g, v in zip(gradients, values, strict=True)), None

    losses.defvjp(forward, backward, symbolic_zeros=True)
    return losses(*_taken(rows, layer))


def _taken(rows: Rows, layer: Layer) -> tuple[Any, Any]:
    """What gets gradients, and the rest."""
    return (rows.x, layer.weight, layer.bias), (rows._replace(x=None), layer.counts)


def _put(operands: Any, rest: Any) -> tuple[Rows, Layer]:
    x, weight, bias = operands
    return rest[0]._replace(x=x), Layer(weight, bias, rest[1])


def _perturbed(operands: Any) -> tuple[Any, list[bool]]:
    return _values(operands), [o is not None and o.perturbed for o in operands]


def _values(primals: Any) -> Any:
    return jax.tree.map(lambda p: p.value, primals)


def _walk(rows: Rows, layer: Layer, size: int, needs: Sequence[bool] = (False,) * 3) -> tuple[jax.Array, list[Any]]:
    """The losses of all rows, block by block, and the needed gradients of x, weight and bias, those of one block not rounded."""
    n, blocks = _blocks(rows, layer.weight.shape[0], size)
    if n == 1:
        return _block(rows, layer, needs)

    def step(sums: Any, block: Rows) -> Any:
        losses, (x, *found) = _block(block, layer, needs)
        return [None if s is None else (s + g).astype(s.dtype) for s, g in zip(sums, found, strict=True)], (losses, x)

    # In bfloat16 the weights' gradient is rounded after each block, as in torch's own form in chunks; a sum in float32 would take
    # as much memory as the logits of 8,192 rows. Sums in float16 could overflow.
    precise, dtype = accumulator(rows.x.dtype), layer.weight.dtype
    kinds = ((layer.weight.shape, precise if dtype == np.float16 else dtype), (layer.weight.shape[:1], precise))
    sums = [jnp.zeros(*kind) if need else None for kind, need in zip(kinds, needs[1:], strict=True)]
    sums, (losses, x) = lax.scan(step, sums, blocks)
    length = rows.x.shape[0]
    return _joined(losses)[:length], [None if x is None else _joined(x)[:length], *sums]


def _blocks(rows: Rows, classes: int, size: int) -> tuple[int, Rows]:
    """How many blocks, and the rows as ``[blocks, rows of a block, ...]``; those that are added do not count."""
    length = rows.x.shape[0]
    n = -(-length // (size or max(_ROWS, _LOGITS // max(classes, 1)) * batch_parts())) if length else 1
    if n == 1:
        return 1, rows
    each = -(-length // n)
    each = size if size and n * size >= length else -(-each // 8) * 8

    def divide(t: jax.Array) -> jax.Array:
        t = jnp.pad(t, ((0, n * each - length), *[(0, 0)] * (t.ndim - 1)))
        # Where devices have rows of their own, each block takes some of every device.
        return jnp.swapaxes(t.reshape(each, n, *t.shape[1:]), 0, 1) if divided() else t.reshape(n, each, *t.shape[1:])

    return n, jax.tree.map(divide, rows)


def _joined(t: jax.Array) -> jax.Array:
    t = jnp.swapaxes(t, 0, 1) if divided() else t
    return t.reshape(-1, *t.shape[2:])


def _block(rows: Rows, layer: Layer, needs: Any) -> tuple[jax.Array, list[Any]]:
    """Losses of a block, and the needed gradients of x, weight and bias."""
    dtype, precise = rows.x.dtype, accumulator(rows.x.dtype)

    def product(a: Any, b: Any, *contract: int) -> Any:
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, dimensions, preferred_element_type=precise)

    logits = product(rows.x, layer.weight, 1, 1)
    if layer.bias is not None:
        logits = logits + layer.bias.astype(precise)
    top = jnp.max(logits, 1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0)
    lse = (jnp.log(jnp.sum(jnp.exp(logits - top), 1, keepdims=True)) + top)[:, 0]
    hit = lax.broadcasted_iota(np.int32, logits.shape, 1) == rows.target[:, None]
    losses = rows.scale * (lse - jnp.sum(jnp.where(hit, logits, 0), 1))
    factor = rows.scale
    if rows.smooth is not None:
        weighted = logits if layer.counts is None else logits * layer.counts
        weights = layer.weight.shape[0] if layer.counts is None else jnp.sum(layer.counts)
        losses = losses + rows.smooth * (lse * weights - jnp.sum(weighted, 1))
        factor = factor + rows.smooth * weights
    losses = jnp.where(rows.counts, losses, 0)
    if not any(needs):
        return losses, [None] * 3
    grad = jnp.exp(logits - lse[:, None]) * factor[:, None] - jnp.where(hit, rows.scale[:, None], 0)
    if rows.smooth is not None:
        grad = grad - rows.smooth[:, None] * (1 if layer.counts is None else layer.counts)
    if rows.grad is not None:
        grad = grad * rows.grad[:, None]
    narrow = grad.astype(dtype)
    x = product(narrow, layer.weight, 1, 0).astype(dtype) if needs[0] else None
    weight = product(narrow, rows.x, 0, 0) if needs[1] else None
    return losses, [x, weight, jnp.sum(grad, 0) if needs[2] else None]
