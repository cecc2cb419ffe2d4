"""JAX functions under torch's autograd: `j2t_autograd` and what `torch_view` and `call_jax` are made of."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.utils.checkpoint
from torch._C._functorch import peek_interpreter_stack
from torchax._execute import state
from torchax._execute._where import user_line
from torchax.tensor import Tensor

from ._enter import enter, noting, random_state, same_random, to_array, to_tensor
from ._tree import flatten, tree_map, unflatten


def call_differentiable(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A JAX function on nests of tensors; through `Bridge` where a gradient may be asked for."""
    leaves: list[Any] = []
    spec = flatten((args, kwargs), leaves)
    needed = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves)
    if not needed and peek_interpreter_stack() is None:
        a, k = unflatten(spec, iter([to_array(x) for x in leaves]))
        with in_64_bit(leaves):
            return tree_map(to_tensor, fn(*a, **k))
    return _differentiable(fn, spec, leaves)


def j2t_autograd(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A JAX function as a torch function that torch's autograd goes through.

    The backward is `jax.vjp`; it is itself differentiable (second derivatives, `create_graph=True`).

    Args:
        fn: takes and gives nests of `jax.Array`s.

    Returns:
        The same over nests of tensors on device ``jax``; other leaves are passed as they are.
    """

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves: list[Any] = []
        spec = flatten((args, kwargs), leaves)
        return _differentiable(fn, spec, leaves)

    return call


def _differentiable(fn: Callable[..., Any], spec: Any, leaves: list[Any]) -> Any:
    where = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    call = JaxCall(fn, spec, leaves, where)
    outs = Bridge.apply(call, *[leaves[i] for i in where])
    flat = list(call.rest)
    for i, t in zip(call.out_where, outs, strict=True):
        flat[i] = t
    return unflatten(call.out_spec, iter(flat))


def transformed(transform: Callable[[Any], Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """A JAX transformation of a torch function, over tensors; gradients reach what the function uses without being given it, too.

    Args:
        transform: takes a JAX function, gives one; it calls what it was given while JAX traces.
        fn: takes and gives nests of tensors.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        plain = transform(lambda *a, **k: enter(fn, a, k))
        used = _used(plain, args, kwargs) if torch.is_grad_enabled() else []
        if not used:
            return call_differentiable(plain, args, kwargs)

        def lifted(arrays: list[Any], *a: Any, **k: Any) -> Any:
            given = {t._s: _base(t, x) for t, x in zip(used, arrays, strict=True)}
            return transform(lambda *a, **k: enter(fn, a, k, given))(*a, **k)

        return call_differentiable(lifted, (used, *args), kwargs)

    return call


def _used(fn: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """Tensors that require gradients and that torch code in a JAX function uses without being given them: it is traced once."""
    leaves: list[Any] = []
    spec = flatten((args, kwargs), leaves)
    where = [i for i, x in enumerate(leaves) if isinstance(x, (torch.Tensor, jax.Array))]
    call = JaxCall(fn, spec, leaves, where)
    arrays = [to_array(leaves[i]) for i in where]
    own = {id(x) for x in leaves}
    with noting(dry=True) as noted, jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it runs again
        jax.eval_shape(call.flat, *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays])
    return [t for t in noted.values() if id(t) not in own and type(t) is Tensor]


def _base(t: Tensor, value: Any) -> Any:
    """The payload of the tensor's storage in which the tensor has the value."""
    view = t._v
    return value if view is None else view.chain.write.fn(state.executor.load(t._s), value, *view.positions)


class JaxCall:
    """One call of a JAX function: a flat function of the tensors' arrays, and after the run the nest of its results."""

    def __init__(self, fn: Callable[..., Any], spec: Any, leaves: list[Any], where: list[int]):
        self.fn, self.spec, self.where = fn, spec, where
        self.leaves = [None if i in set(where) else x for i, x in enumerate(leaves)]
        self.out_spec: Any = None
        self.out_where: list[int] = []
        self.rest: list[Any] = []
        self.random: Any = None

    def flat(self, *arrays: Any) -> tuple[Any, ...]:
        full = list(self.leaves)
        for i, x in zip(self.where, arrays, strict=True):
            full[i] = x
        args, kwargs = unflatten(self.spec, iter(full))
        found: list[Any] = []
        self.out_spec = flatten(self.fn(*args, **kwargs), found)
        self.out_where = [i for i, x in enumerate(found) if isinstance(x, jax.Array) and _holds(x)]
        self.rest = [None if isinstance(x, jax.Array) and _holds(x) else x for x in found]
        return tuple(found[i] for i in self.out_where)


class Bridge(torch.autograd.Function):
    """A JAX function as a node of torch's graph."""

    @staticmethod
    def forward(call: JaxCall, *tensors: torch.Tensor) -> Any:  # type: ignore[override]
        call.random = random_state()
        arrays = [to_array(t) for t in tensors]
        with in_64_bit(tensors):
            return tuple(_fresh(x, arrays) for x in call.flat(*arrays))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])
        ctx.kinds = [t.is_floating_point() or t.is_complex() for t in inputs[1:]]
        ctx.out_kinds = [t.is_floating_point() or t.is_complex() for t in output]
        ctx.mark_non_differentiable(*[t for t in output if not (t.is_floating_point() or t.is_complex())])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        tensors = ctx.saved_tensors
        wanted = [i for i, kind in enumerate(ctx.kinds) if kind and ctx.needs_input_grad[i + 1]]
        given = [g for g, kind in zip(grads, ctx.out_kinds, strict=True) if kind]
        found = j2t_autograd(vjp_of(ctx.call, wanted, ctx.out_kinds))(list(tensors), given)
        result: list[Any] = [None] * (len(tensors) + 1)
        for i, g in zip(wanted, found, strict=True):
            result[i + 1] = g
        return tuple(result)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        tensors = ctx.saved_tensors
        wanted = [i for i, (t, kind) in enumerate(zip(tangents, ctx.kinds, strict=True)) if kind and t is not None]
        found = iter(j2t_autograd(_jvp(ctx.call, wanted))(list(tensors), [tangents[i] for i in wanted]))
        return tuple(t if kind else None for t, kind in zip(found, ctx.out_kinds, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: JaxCall, *tensors: Any) -> Any:
        fn = jax.vmap(lambda *arrays: call.flat(*arrays), in_axes=tuple(in_dims[1:]), axis_size=info.batch_size)
        outs = j2t_autograd(lambda *arrays: fn(*arrays))(*tensors)
        return outs, tuple(0 for _ in outs)


def vjp_of(call: JaxCall, wanted: list[int], out_kinds: list[bool]) -> Callable[..., Any]:
    """(inputs, cotangents of the floating results) -> gradients of the wanted inputs, as a JAX function."""

    def run(arrays: list[Any], cotangents: list[Any]) -> list[Any]:
        def forward(*chosen: Any) -> Any:
            full = list(arrays)
            for i, x in zip(wanted, chosen, strict=True):
                full[i] = x
            outs = call.flat(*full)
            return [o for o, kind in zip(outs, out_kinds, strict=True) if kind]

        with noting() as lost, _again(call):
            outs, vjp = jax.vjp(forward, *[arrays[i] for i in wanted])
        if lost:
            _warn_of_lost(list(lost.values()))
        # jax and torch disagree about the gradient of complex numbers by a conjugate
        found = vjp([_conj(g.astype(o.dtype)) for g, o in zip(cotangents, outs, strict=True)])
        return [_conj(g) for g in found]

    return run


def _jvp(call: JaxCall, wanted: list[int]) -> Callable[..., Any]:
    """(inputs, tangents of the wanted ones) -> tangents of the results, as a JAX function."""

    def run(arrays: list[Any], tangents: list[Any]) -> list[Any]:
        def forward(*chosen: Any) -> Any:
            full = list(arrays)
            for i, x in zip(wanted, chosen, strict=True):
                full[i] = x
            return call.flat(*full)

        primals = [arrays[i] for i in wanted]
        given = [t.astype(x.dtype) for t, x in zip(tangents, primals, strict=True)]
        with _again(call):
            outs, found = jax.jvp(forward, primals, given)
        return [t if t.dtype == o.dtype else jnp.zeros_like(o) for t, o in zip(found, outs, strict=True)]

    return run


def _again(call: JaxCall) -> Any:
    return _nothing if call.random is None else same_random(call.random)


def _warn_of_lost(tensors: list[torch.Tensor]) -> None:
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:3])
    warnings.warn(
        f"a torch function inside of a JAX function uses {len(tensors)} tensor(s) that require a gradient (of shapes {shapes}) "
        f"without being given them: they get none from here{user_line()}. Pass them as arguments: see torchax.extract_jax",
        UserWarning,
        stacklevel=2,
    )


def _conj(x: Any) -> Any:
    return jnp.conj(x) if jnp.iscomplexobj(x) else x


def _fresh(x: Any, operands: list[Any]) -> Tensor:
    """A tensor for a result; one of its own where the function gave back an operand."""
    if any(x is o for o in operands):
        x = jnp.copy(x)
    return Tensor(x)


def _holds(x: jax.Array) -> bool:
    return not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)


def in_64_bit(leaves: Any) -> Any:
    """JAX's 64-bit mode where a 64-bit tensor takes part, so that its dtype is kept."""
    wide = any(type(x) is Tensor and x._m.wide for x in leaves)
    return jax.enable_x64(True) if wide else _nothing


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


_nothing = _Nothing()


__all__ = ["j2t_autograd"]
