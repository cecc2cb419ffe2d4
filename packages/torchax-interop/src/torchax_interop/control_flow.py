"""`torch.cond`, `torch.while_loop`, `scan` and `associative_scan` as XLA's own control flow.

Torch's functions of these names come here when tensors on device ``jax`` take part. Inside of compiled functions they are
part of the program. Eagerly, the loops are compiled (once per function), and `torch.cond` runs the branch that is chosen.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax._execute._where import user_line

from ._flow import differentiable_by, flow, without_gradient
from ._groups import dense
from ._operands import (
    Operands,
    as_tuple,
    canonical,
    check_carry,
    check_same_results,
    leaves_of,
    map_tensors,
    results_of,
    slices_of,
    stacked,
    tracing,
    words,
)
from ._regions import Region, Scope, cells_of, holding
from ._tree import flatten, unflatten


# ---------------------------------------------------------------------- the four functions
def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    """`torch.cond`: ``true_fn(*operands) if pred else false_fn(*operands)``.

    Args:
        pred: a bool, or a tensor of one element.
        true_fn: gives a nest of tensors.
        false_fn: gives the same nest, of the same shapes and dtypes.
        operands: a tuple of nests of tensors. Other tensors that the functions use are found; one that was computed and
            requires a gradient must be an operand or a variable that the function closes over.

    Raises:
        RuntimeError: `pred` is not one element, the functions give different nests.
    """
    if isinstance(pred, (bool, int, float)):
        return true_fn(*operands) if pred else false_fn(*operands)
    if not isinstance(pred, torch.Tensor) or pred.numel() != 1:
        raise RuntimeError(
            f"torch.cond: pred must be a bool or a tensor of one element; got {words(pred)}{user_line()}"
        )
    if not callable(true_fn) or not callable(false_fn):
        raise RuntimeError(f"torch.cond: both branches must be functions{user_line()}")
    if not tracing(pred):
        return true_fn(*operands) if pred.item() else false_fn(*operands)
    flat = Operands((true_fn, false_fn), tuple(operands))
    regions = [
        Region(flat.over(f), flat.arguments(), f"torch.cond's {n}")
        for f, n in ((true_fn, "true_fn"), (false_fn, "false_fn"))
    ]
    check_same_results(*regions)
    scope = Scope(regions)
    differentiable = differentiable_by(flat.tensors, scope)
    yes, no = [r.function(scope, differentiable) for r in regions]

    def run(choice: Any, *arrays: Any) -> list[Any]:
        return jax.lax.cond(choice.reshape(()).astype(bool), yes, no, *arrays)

    grads = [a[1] or b[1] for a, b in zip(regions[0].tensors, regions[1].tensors, strict=True)]
    outs = [(m, g) for (m, _), g in zip(regions[0].tensors, grads, strict=True)]
    return results_of(regions[0], flow(run, [pred, *flat.tensors], scope, outs, differentiable))


def while_loop(cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried_inputs: Any) -> Any:
    """`torch.while_loop`: ``body_fn(*values)`` again and again while ``cond_fn(*values)``.

    Gradients are not to be had (`lax.while_loop` has none); for a known number of turns use `scan`.

    Args:
        cond_fn: gives a bool or a tensor of one element.
        body_fn: gives what it takes: the same nest, shapes and dtypes.
        carried_inputs: a tuple of nests of tensors and ints; ints become int64 tensors without dimensions.

    Raises:
        RuntimeError: `body_fn` gives something else than it takes, or `cond_fn` writes a tensor.
    """
    if not callable(cond_fn) or not callable(body_fn):
        raise RuntimeError(f"torch.while_loop: cond_fn and body_fn must be functions{user_line()}")
    if not isinstance(carried_inputs, (tuple, list)):
        raise RuntimeError(
            f"torch.while_loop: carried_inputs must be a tuple; got {words(carried_inputs)}{user_line()}"
        )
    leaves: list[Any] = []
    spec = flatten(tuple(carried_inputs), leaves)
    for x in leaves:
        if not isinstance(x, (torch.Tensor, int)):
            raise RuntimeError(f"torch.while_loop carries tensors and ints; got {words(x)}{user_line()}")
    values = unflatten(spec, iter([torch.tensor(x, device="jax") if isinstance(x, int) else x for x in leaves]))
    if not tracing(*leaves):
        return _compiled(_while_loop, cond_fn, body_fn)(values)
    return _while_loop(cond_fn, body_fn, values)


def _while_loop(cond_fn: Any, body_fn: Any, values: Any) -> Any:
    needed = [t for t in leaves_of(values) if t.requires_grad] if torch.is_grad_enabled() else []
    with torch.no_grad():
        flat = Operands((cond_fn, body_fn), values)
        condition = Region(flat.over(cond_fn), flat.arguments(), "torch.while_loop's cond_fn")
        body = Region(
            flat.over(lambda *given: as_tuple(body_fn(*given))), flat.arguments(), "torch.while_loop's body_fn"
        )
        check_carry("torch.while_loop", "body_fn", "carried_inputs", flat, body)
        if condition.written:
            raise RuntimeError(
                f"torch.while_loop: cond_fn writes a tensor or draws random numbers{user_line()}; do that in body_fn"
            )
        constant = condition.outs[0] if len(condition.outs) == 1 and not condition.tensors else None
        scope = Scope([condition, body])
        go_on, step = condition.function(scope, False), body.function(scope, False)
        n, places = len(flat.tensors), [scope.place(s) for s in scope.written]

        def run(*arrays: Any) -> list[Any]:
            def inputs(carried: list[Any]) -> list[Any]:
                world = list(arrays[n:])
                for p, x in zip(places, carried[n:], strict=True):
                    world[p] = x
                return [*carried[:n], *world]

            def test(carried: list[Any]) -> Any:
                if constant is not None:
                    return jnp.bool_(constant)
                return go_on(*inputs(carried))[0].reshape(()).astype(bool)

            first = [*arrays[:n], *[arrays[n + p] for p in places]]
            return jax.lax.while_loop(test, lambda carried: step(*inputs(carried)), first)

        outs = flow(run, flat.tensors, scope, [(m, False) for m, _ in body.tensors], False)
    results = results_of(body, outs)
    return without_gradient(results, needed) if needed else results


def scan(combine_fn: Callable[..., Any], init: Any, xs: Any, *, dim: int = 0, reverse: bool = False) -> Any:
    """`torch._higher_order_ops.scan`: ``carry, y = combine_fn(carry, x)`` for every slice of `xs`, as `lax.scan`.

    Args:
        combine_fn: takes the carry and a slice, gives the next carry (the same nest, shapes and dtypes) and a result.
        init: the first carry, a nest of tensors.
        xs: a nest of tensors, cut along `dim`.
        dim: the dimension to cut along, and to stack results along.
        reverse: from the last slice to the first.

    Returns:
        ``(carry, ys)``: the last carry, and the results stacked along `dim`.

    Raises:
        RuntimeError: as torch's, and when `combine_fn` gives another carry than it takes.
    """
    if not callable(combine_fn):
        raise RuntimeError(f"scan: combine_fn must be a function; got {words(combine_fn)}{user_line()}")
    slices = slices_of("scan", RuntimeError, xs)
    if not slices:
        return init, []
    first: list[Any] = []
    flatten(init, first)
    if not first or not all(isinstance(x, torch.Tensor) for x in first):
        raise RuntimeError(f"scan: init must be a nest of tensors; got {words(init)}{user_line()}")
    dim = canonical("scan", RuntimeError, slices, dim)
    if not tracing(*slices, *first):
        return _compiled(_scan, combine_fn, dim, reverse)(init, xs)
    return _scan(combine_fn, dim, reverse, init, xs)


def _scan(combine_fn: Any, dim: int, reverse: bool, init: Any, xs: Any) -> Any:
    carry, ys = scan_over(combine_fn, init, xs, (), dim=dim, reverse=reverse)
    if dim:
        ys = map_tensors(lambda t: torch.movedim(t, 0, dim) if dim < t.ndim else t, ys)
    return carry, ys


def scan_over(
    combine_fn: Callable[..., Any],
    init: Any,
    xs: Any,
    fixed: Sequence[Any],
    *,
    dim: int = 0,
    reverse: bool = False,
    remat: Any = False,
    name: str = "scan",
    unroll: int = 1,
) -> Any:
    """``carry, y = combine_fn(carry, x, *fixed)`` over slices; only while tracing.

    Args:
        combine_fn: see `scan`.
        init: see `scan`.
        xs: see `scan`.
        fixed: nests that every turn gets.
        dim: see `scan`; results are stacked along dimension 0.
        reverse: see `scan`.
        remat: compute again in the backward instead of keeping what a turn computed; True, or a policy of `jax.checkpoint`.
        name: what the user called, for messages.
        unroll: see `jax.lax.scan`.
    """
    flat = Operands((combine_fn,), (init, xs, *fixed))
    n_init, n_xs = len(leaves_of(init)), len(leaves_of(xs))
    for i in range(n_init, n_init + n_xs):
        flat.sliced[i] = dim
    needed = torch.is_grad_enabled()
    grow = needed and any(t.requires_grad for t in flat.tensors)
    region = Region(flat.over(combine_fn), flat.arguments(n_init if grow else 0), f"{name}'s combine_fn")
    if needed and not grow and region.leaves:  # parameters alone: the carry requires a gradient after the first turn
        grow = True
        region = Region(flat.over(combine_fn), flat.arguments(n_init), f"{name}'s combine_fn")
    if not (type(region.out_spec) is tuple and region.out_spec[0] in (tuple, list) and len(region.out_spec[1]) == 2):
        raise RuntimeError(f"{name}: combine_fn must give a pair, the next carry and a result{user_line()}")
    check_carry(name, "combine_fn", "init", flat, region, n_init)
    scope = Scope([region])
    differentiable = differentiable_by(flat.tensors, scope)
    step = region.function(scope, differentiable)
    if remat:
        step = jax.checkpoint(step, prevent_cse=False, policy=None if remat is True else remat)
    places = [scope.place(s) for s in scope.written]
    n, n_results = len(flat.tensors), len(region.tensors)

    def run(*arrays: Any) -> list[Any]:
        first, others, world = list(arrays[:n_init]), arrays[n_init + n_xs : n], list(arrays[n:])
        slices = [jnp.moveaxis(a, dim, 0) for a in arrays[n_init : n_init + n_xs]]

        def turn(c: list[Any], x: list[Any]) -> Any:
            rest = list(world)
            for p, value in zip(places, c[n_init:], strict=True):
                rest[p] = value
            outs = step(*c[:n_init], *x, *others, *rest)
            return [*outs[:n_init], *outs[n_results:]], outs[n_init:n_results]

        c, ys = jax.lax.scan(turn, [*first, *[world[p] for p in places]], slices, reverse=reverse, unroll=unroll)
        return [*c[:n_init], *ys, *c[n_init:]]

    length = flat.tensors[n_init].shape[dim]
    outs = [(m, g) if i < n_init else (stacked(m, length), g) for i, (m, g) in enumerate(region.tensors)]
    return results_of(region, flow(run, flat.tensors, scope, outs, differentiable))


def associative_scan(
    combine_fn: Callable[..., Any], xs: Any, dim: int, reverse: bool = False, combine_mode: str = "pointwise"
) -> Any:
    """`torch._higher_order_ops.associative_scan` as `lax.associative_scan`.

    Args:
        combine_fn: associative; takes two slices (nests as `xs` without dimension `dim`) and gives one.
        xs: a nest of tensors.
        dim: the dimension to scan.
        reverse: from the end.
        combine_mode: ``"pointwise"`` or ``"generic"``; both are done in the same way.

    Raises:
        ValueError: as torch's.
        RuntimeError: `combine_fn` gives something else than a slice, or writes a tensor.
    """
    if not callable(combine_fn):
        raise ValueError(f"Combine_fn must be a callable, but got {combine_fn}")
    if combine_mode not in ("pointwise", "generic"):
        raise ValueError(f"Combine_mode must either 'pointwise' or 'generic', but got {combine_mode}")
    slices = slices_of("associative_scan", ValueError, xs)
    if not slices:
        raise ValueError("Expected at least 1 xs leaf")
    dim = canonical("associative_scan", ValueError, slices, dim)
    if not tracing(*slices):
        return _compiled(_associative_scan, combine_fn, dim, reverse)(xs)
    return _associative_scan(combine_fn, dim, reverse, xs)


def _associative_scan(combine_fn: Any, dim: int, reverse: bool, xs: Any) -> Any:
    flat = Operands((combine_fn,), (xs, xs))
    n = len(leaves_of(xs))
    for i in range(2 * n):
        flat.sliced[i] = dim
    region = Region(flat.over(combine_fn), flat.arguments(), "associative_scan's combine_fn")
    check_carry("associative_scan", "combine_fn", "a slice of xs", flat, region, n)
    if region.written:
        raise RuntimeError(f"associative_scan: combine_fn writes a tensor or draws random numbers{user_line()}")
    scope = Scope([region])
    differentiable = differentiable_by(flat.tensors, scope)
    combine = region.function(scope, differentiable)
    tensors = [*flat.tensors[:n], *flat.lifted]

    def run(*arrays: Any) -> list[Any]:
        slices = [jnp.moveaxis(a, dim, 0) for a in arrays[:n]]
        batched = jax.vmap(combine, in_axes=(*[0] * (2 * n), *[None] * (len(arrays) - n)))
        outs = jax.lax.associative_scan(lambda a, b: batched(*a, *b, *arrays[n:]), slices, reverse=reverse)
        return [jnp.moveaxis(o, 0, dim) for o in outs]

    outs = [(dense(t._m), g) for t, (_, g) in zip(tensors, region.tensors, strict=False)]
    return results_of(region, flow(run, tensors, scope, outs, differentiable))


# ---------------------------------------------------------------------- eagerly
_LIMIT = 128
_programs: dict[Any, Any] = {}


def _compiled(loop: Callable[..., Any], *functions: Any) -> Callable[..., Any]:
    """`loop` with its functions, compiled; kept for functions of the same code that close over the same objects."""
    from .compile import Compiled

    cells = cells_of(*functions) if torch.is_grad_enabled() else []
    lifted = [c.cell_contents for c in cells]
    key = (loop, *[_function_key(f, cells) for f in functions])
    program = _programs.pop(key, None)
    if program is None:

        def run(lifted: list[Any], *operands: Any) -> Any:
            with holding(cells, lifted):
                return loop(*functions, *operands)

        program = Compiled(run), functions
    _programs[key] = program  # the latest is last
    while len(_programs) > _LIMIT:
        del _programs[next(iter(_programs))]
    return functools.partial(program[0], lifted)


def _function_key(f: Any, cells: Sequence[Any]) -> Any:
    """Equal for functions that do the same; the objects named in it are kept alive by the function that was compiled."""
    if isinstance(f, types.MethodType):
        return "method", id(f.__self__), _function_key(f.__func__, cells)
    if not isinstance(f, types.FunctionType):
        return (type(f), f) if isinstance(f, (int, bool, str)) else ("object", id(f))
    held = []
    for cell in f.__closure__ or ():
        try:
            x = cell.cell_contents
        except ValueError:
            held.append(None)
            continue
        if any(cell is c for c in cells):
            held.append("lifted")
        elif isinstance(x, types.FunctionType):
            held.append(_function_key(x, cells))
        elif isinstance(x, (int, float, bool, str, type(None))):
            held.append((type(x), x))
        else:
            held.append(id(x))
    defaults = tuple(id(x) for x in f.__defaults__ or ())
    return f.__code__, tuple(held), defaults


__all__ = ["associative_scan", "cond", "scan", "scan_over", "while_loop"]
