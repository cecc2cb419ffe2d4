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
import jax.core
import jax.numpy as jnp
import torch
from torchax._execute import state
from torchax._execute._where import user_line
from torchax._storage import TensorMeta, dense_meta
from torchax.tensor import Tensor, wrap

from ._enter import under_jax
from ._groups import dense
from ._recording import NotDifferentiable
from ._regions import Region, Scope, cells_of, conj, holding
from ._tree import Spec, flatten, unflatten
from .autograd import j2t_autograd


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
            f"torch.cond: pred must be a bool or a tensor of one element; got {_words(pred)}{user_line()}"
        )
    if not callable(true_fn) or not callable(false_fn):
        raise RuntimeError(f"torch.cond: both branches must be functions{user_line()}")
    if not _tracing(pred):
        return true_fn(*operands) if pred.item() else false_fn(*operands)
    flat = _Flat((true_fn, false_fn), tuple(operands))
    regions = [
        Region(flat.over(f), flat.arguments(), f"torch.cond's {n}")
        for f, n in ((true_fn, "true_fn"), (false_fn, "false_fn"))
    ]
    _same_results(*regions)
    scope = Scope(regions)
    differentiable = _differentiable(flat.tensors, scope)
    yes, no = [r.function(scope, differentiable) for r in regions]

    def run(choice: Any, *arrays: Any) -> list[Any]:
        return jax.lax.cond(choice.reshape(()).astype(bool), yes, no, *arrays)

    grads = [a[1] or b[1] for a, b in zip(regions[0].tensors, regions[1].tensors, strict=True)]
    outs = [(m, g) for (m, _), g in zip(regions[0].tensors, grads, strict=True)]
    return _results(regions[0], _flow(run, [pred, *flat.tensors], scope, outs, differentiable))


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
            f"torch.while_loop: carried_inputs must be a tuple; got {_words(carried_inputs)}{user_line()}"
        )
    leaves: list[Any] = []
    spec = flatten(tuple(carried_inputs), leaves)
    for x in leaves:
        if not isinstance(x, (torch.Tensor, int)):
            raise RuntimeError(f"torch.while_loop carries tensors and ints; got {_words(x)}{user_line()}")
    values = unflatten(spec, iter([torch.tensor(x, device="jax") if isinstance(x, int) else x for x in leaves]))
    if not _tracing(*leaves):
        return _compiled(_while_loop, cond_fn, body_fn)(values)
    return _while_loop(cond_fn, body_fn, values)


def _while_loop(cond_fn: Any, body_fn: Any, values: Any) -> Any:
    needed = [t for t in _leaves(values) if t.requires_grad] if torch.is_grad_enabled() else []
    with torch.no_grad():
        flat = _Flat((cond_fn, body_fn), values)
        condition = Region(flat.over(cond_fn), flat.arguments(), "torch.while_loop's cond_fn")
        body = Region(
            flat.over(lambda *given: _as_tuple(body_fn(*given))), flat.arguments(), "torch.while_loop's body_fn"
        )
        _carries_on("torch.while_loop", "body_fn", "carried_inputs", flat, body)
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

        outs = _flow(run, flat.tensors, scope, [(m, False) for m, _ in body.tensors], False)
    results = _results(body, outs)
    return _map(lambda t: _NoGradient.apply(t, *needed) if t.is_floating_point() else t, results) if needed else results


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
        raise RuntimeError(f"scan: combine_fn must be a function; got {_words(combine_fn)}{user_line()}")
    slices = _slices("scan", RuntimeError, xs)
    if not slices:
        return init, []
    first: list[Any] = []
    flatten(init, first)
    if not first or not all(isinstance(x, torch.Tensor) for x in first):
        raise RuntimeError(f"scan: init must be a nest of tensors; got {_words(init)}{user_line()}")
    dim = _canonical("scan", RuntimeError, slices, dim)
    if not _tracing(*slices, *first):
        return _compiled(_scan, combine_fn, dim, reverse)(init, xs)
    return _scan(combine_fn, dim, reverse, init, xs)


def _scan(combine_fn: Any, dim: int, reverse: bool, init: Any, xs: Any) -> Any:
    carry, ys = scan_over(combine_fn, init, xs, (), dim=dim, reverse=reverse)
    if dim:
        ys = _map(lambda t: torch.movedim(t, 0, dim) if dim < t.ndim else t, ys)
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
    flat = _Flat((combine_fn,), (init, xs, *fixed))
    n_init, n_xs = len(_leaves(init)), len(_leaves(xs))
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
    _carries_on(name, "combine_fn", "init", flat, region, n_init)
    scope = Scope([region])
    differentiable = _differentiable(flat.tensors, scope)
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
    outs = [(m, g) if i < n_init else (_stacked(m, length), g) for i, (m, g) in enumerate(region.tensors)]
    return _results(region, _flow(run, flat.tensors, scope, outs, differentiable))


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
    slices = _slices("associative_scan", ValueError, xs)
    if not slices:
        raise ValueError("Expected at least 1 xs leaf")
    dim = _canonical("associative_scan", ValueError, slices, dim)
    if not _tracing(*slices):
        return _compiled(_associative_scan, combine_fn, dim, reverse)(xs)
    return _associative_scan(combine_fn, dim, reverse, xs)


def _associative_scan(combine_fn: Any, dim: int, reverse: bool, xs: Any) -> Any:
    flat = _Flat((combine_fn,), (xs, xs))
    n = len(_leaves(xs))
    for i in range(2 * n):
        flat.sliced[i] = dim
    region = Region(flat.over(combine_fn), flat.arguments(), "associative_scan's combine_fn")
    _carries_on("associative_scan", "combine_fn", "a slice of xs", flat, region, n)
    if region.written:
        raise RuntimeError(f"associative_scan: combine_fn writes a tensor or draws random numbers{user_line()}")
    scope = Scope([region])
    differentiable = _differentiable(flat.tensors, scope)
    combine = region.function(scope, differentiable)
    tensors = [*flat.tensors[:n], *flat.lifted]

    def run(*arrays: Any) -> list[Any]:
        slices = [jnp.moveaxis(a, dim, 0) for a in arrays[:n]]
        batched = jax.vmap(combine, in_axes=(*[0] * (2 * n), *[None] * (len(arrays) - n)))
        outs = jax.lax.associative_scan(lambda a, b: batched(*a, *b, *arrays[n:]), slices, reverse=reverse)
        return [jnp.moveaxis(o, 0, dim) for o in outs]

    outs = [(dense(t._m), g) for t, (_, g) in zip(tensors, region.tensors, strict=False)]
    return _results(region, _flow(run, tensors, scope, outs, differentiable))


# ---------------------------------------------------------------------- arguments
class _Flat:
    """The operands of functions as one list of tensors.

    Attributes:
        own: those that the user gave.
        lifted: those that the functions close over, and that have a gradient history.
        sliced: position -> dimension that the functions do not see.
    """

    def __init__(self, functions: Sequence[Any], operands: tuple[Any, ...]):
        leaves: list[Any] = []
        self.spec: Spec = flatten(operands, leaves)
        self.leaves = leaves
        self.at = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        self.own = [_on_device(leaves[i]) for i in self.at]
        self.cells = cells_of(*functions)
        self.lifted: list[Tensor] = [c.cell_contents for c in self.cells] if torch.is_grad_enabled() else []
        self.cells = self.cells[: len(self.lifted)]
        self.tensors: list[Tensor] = [*self.own, *self.lifted]
        self.sliced: dict[int, int] = {}

    def arguments(self, growing: int = 0) -> list[tuple[TensorMeta, bool]]:
        """Metadata of what a function sees, and whether it requires a gradient (the first `growing` in any case)."""
        grad = torch.is_grad_enabled()
        found = []
        for i, t in enumerate(self.tensors):
            meta = _without(t._m, self.sliced[i]) if i in self.sliced else t._m
            can = meta.dtype.is_floating_point or meta.dtype.is_complex
            found.append((meta, grad and can and (t.requires_grad or i < growing)))
        return found

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as a function of the list."""

        def call(*tensors: Tensor) -> Any:
            leaves = list(self.leaves)
            n = len(self.own)
            for i, t in zip(self.at, tensors[:n], strict=True):
                leaves[i] = t
            with holding(self.cells, tensors[n:]):
                return fn(*unflatten(self.spec, iter(leaves)))

        return call


def _on_device(t: torch.Tensor) -> Tensor:
    return t if type(t) is Tensor else t.to("jax")  # type: ignore[return-value]


def _tracing(*tensors: Any) -> bool:
    traced = any(type(t) is Tensor and isinstance(t._s.value, jax.core.Tracer) for t in tensors)
    return traced or state.executor.owner is not None or under_jax()


def _leaves(x: Any) -> list[Any]:
    leaves: list[Any] = []
    flatten(x, leaves)
    return leaves


def _map(fn: Callable[[Any], Any], x: Any) -> Any:
    leaves: list[Any] = []
    spec = flatten(x, leaves)
    return unflatten(spec, iter([fn(t) if isinstance(t, torch.Tensor) else t for t in leaves]))


def _without(meta: TensorMeta, dim: int) -> TensorMeta:
    return dense_meta(meta.shape[:dim] + meta.shape[dim + 1 :], meta.dtype, meta.index)


def _stacked(meta: TensorMeta, n: int) -> TensorMeta:
    return dense_meta((n, *meta.shape), meta.dtype, meta.index)


def _slices(name: str, kind: type[Exception], xs: Any) -> list[torch.Tensor]:
    leaves = _leaves(xs)
    for x in leaves:
        if not isinstance(x, torch.Tensor):
            raise kind(f"{name}: xs must be a nest of tensors; got {_words(x)} in it{user_line()}")
    return leaves


def _canonical(name: str, kind: type[Exception], slices: list[torch.Tensor], dim: Any) -> int:
    """The dimension, counted from 0, after torch's checks."""
    if not isinstance(dim, int):
        raise kind(f"{name}: dim must be an int; got {_words(dim)}{user_line()}")
    dim = dim + slices[0].ndim if dim < 0 else dim
    sizes = {tuple(t.shape)[dim] if 0 <= dim < t.ndim else 0 for t in slices}
    if 0 in sizes or len(sizes) != 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in slices)
        raise kind(f"{name}: tensors in xs must have dimension {dim}, of one size above 0; got {shapes}{user_line()}")
    return dim


# ---------------------------------------------------------------------- results
def _as_tuple(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x if isinstance(x, tuple) else (x,)


def _words(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return f"{type(x).__name__} {x!r}"[:80]


def _describe(out: Any) -> str:
    if type(out) is tuple and len(out) == 2 and type(out[0]) is TensorMeta:
        return f"{str(out[0].dtype).removeprefix('torch.')}{list(out[0].shape)}"
    return repr(out)


def _same_results(a: Region, b: Region) -> None:
    kind = lambda r: [_describe(o) for o in r.outs]
    if a.out_spec != b.out_spec or kind(a) != kind(b):
        raise RuntimeError(
            f"torch.cond: the branches must give the same nest of the same shapes and dtypes; true_fn gives "
            f"({', '.join(kind(a))}), false_fn ({', '.join(kind(b))}){user_line()}"
        )


def _carries_on(name: str, fn: str, what: str, flat: _Flat, region: Region, n: int | None = None) -> None:
    """A loop's function gives what it takes."""
    n = len(flat.own) if n is None else n
    takes = [_describe((m, False)) for m, _ in flat.arguments()[:n]]
    gives = [_describe(o) for o in region.outs][: n if fn == "combine_fn" and name != "associative_scan" else None]
    if takes != gives:
        raise RuntimeError(
            f"{name}: {fn} must give the shapes and dtypes that it takes; it takes ({', '.join(takes)}) from {what} and gives "
            f"({', '.join(gives)}){user_line()}"
        )


def _results(region: Region, tensors: Sequence[Any]) -> Any:
    found = iter(tensors)
    leaves = [next(found) if type(o) is tuple and len(o) == 2 and type(o[0]) is TensorMeta else o for o in region.outs]
    return unflatten(region.out_spec, iter(leaves))


# ---------------------------------------------------------------------- gradients
def _differentiable(tensors: Sequence[Any], scope: Scope) -> bool:
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


def _flow(
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
        ctx.call = call
        ctx.save_for_backward(*tensors)
        results = [wrap(v, m) for v, (m, _) in zip(outs[: len(call.outs)], call.outs, strict=True)]
        ctx.mark_non_differentiable(*[t for t, (_, g) in zip(results, call.outs, strict=True) if not g])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        call = ctx.call
        given = [grads[i] for i in call.chosen]
        if torch.is_grad_enabled():

            def again(arrays: list[Any], cotangents: list[Any]) -> Any:
                _, vjp, _ = jax.vjp(call.differentiated(arrays), *[arrays[i] for i in call.wanted], has_aux=True)
                return [conj(g) for g in vjp([conj(c) for c in cotangents])]

            found = j2t_autograd(again)(list(ctx.saved_tensors), given)
        else:
            with jax.enable_x64(True):
                cotangents = [conj(state.executor.read(g)) for g in given]
                found = [conj(g) for g in ctx.vjp(cotangents)]
            found = [wrap(g, dense(ctx.saved_tensors[i]._m)) for i, g in zip(call.wanted, found, strict=True)]
        result: list[Any] = [None] * (len(ctx.saved_tensors) + 1)
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
