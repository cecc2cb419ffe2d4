"""A torch function as a function of arrays, for `lax.cond` and the loops: what it reads becomes inputs, what it writes outputs.

Torch's own autograd records the function once, forward and backward in one jaxpr; that is split in two, and the halves are
the rules of a `jax.custom_vjp`. So `no_grad`, `detach` and functions with their own backward count as they do everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
import torch
from torchax._execute import executing, state
from torchax._execute._where import user_line
from torchax._execute.traced import Traced
from torchax._storage import Storage, TensorMeta
from torchax.tensor import Tensor, make

from ._enter import jax_factories
from ._groups import dense
from ._recording import current
from ._split import split
from ._tree import Spec, flatten


class Inside(Traced):
    """The trace of such a function.

    Attributes:
        leaves: leaf tensors from outside that it read and that require gradients (by id).
        histories: tensors from outside that have a gradient history, which would be lost.
    """

    def __init__(self, given: dict[Storage, Any]):
        super().__init__(outer=state.executor)
        self.captured.update(given)
        self.leaves: dict[int, Tensor] = {}
        self.histories: list[Tensor] = []
        self._grad = torch.is_grad_enabled()  # an op with its own backward reads its operands with gradients off

    def read(self, tensor: Tensor) -> Any:
        if tensor._s.owner is not self:
            self._note(tensor)
        return super().read(tensor)

    def _note(self, tensor: Tensor) -> None:
        recording = current()
        if recording is not None:
            recording.note(tensor)
        if not self._grad or not tensor.requires_grad:
            return
        root = tensor if tensor.is_leaf or tensor._base is None else tensor._base
        if root.is_leaf:
            self.leaves[id(root)] = root  # type: ignore[assignment]
        else:
            self.histories.append(tensor)

    def given(self, array: Any, meta: TensorMeta, requires_grad: bool) -> Tensor:
        """An argument of the function."""
        storage = Storage(array, meta)
        storage.owner = self
        t = make(storage, meta)
        return t.requires_grad_() if requires_grad else t  # type: ignore[return-value]


class Region:
    """A torch function that is to become a function of arrays.

    Args:
        fn: takes tensors, gives a nest.
        arguments: metadata of each argument, and whether it requires a gradient.
        name: what the user knows it by, for messages.

    Attributes:
        leaves: see `Inside`.
        storages: from outside, read or written.
        written: those of them that it writes.
        out_spec: the nest of results.
        outs: for each leaf of the results (metadata, whether it requires a gradient), or a value that is no tensor.
    """

    def __init__(self, fn: Callable[..., Any], arguments: Sequence[tuple[TensorMeta, bool]], name: str):
        self.fn, self.name = fn, name
        self.arguments = [(dense(m), g) for m, g in arguments]
        avals = [jax.ShapeDtypeStruct(m.shape, m.jax_dtype) for m, _ in self.arguments]
        with jax.enable_x64(True):
            jax.eval_shape(self._explore, *avals)

    def _explore(self, *arrays: Any) -> list[Any]:
        inside, _, outs, self.out_spec = self._run(arrays, {})
        if inside.histories:
            t = inside.histories[0]
            raise RuntimeError(
                f"{self.name} uses a tensor of shape {tuple(t.shape)} that was computed outside of it and requires a gradient"
                f"{user_line()}; give it among the operands"
            )
        self.leaves = list(inside.leaves.values())
        self.storages = [s for s in inside.captured if s not in {t._s for t in self.leaves if t._v is None}]
        self.written = list(inside.values)
        self.outs = [(dense(t._m), t.requires_grad) if type(t) is Tensor else t for t in outs]
        inside.closed = True
        return []

    def _run(self, arrays: Sequence[Any], given: dict[Storage, Any]) -> tuple[Inside, list[Tensor], list[Any], Spec]:
        inside = Inside(given)
        inputs = [inside.given(a, m, g) for a, (m, g) in zip(arrays, self.arguments, strict=True)]
        outs: list[Any] = []
        with executing(inside), jax_factories():
            spec = flatten(self.fn(*inputs), outs)
        return inside, inputs, outs, spec

    @property
    def tensors(self) -> list[tuple[TensorMeta, bool]]:
        """Those of `outs` that are tensors."""
        return [o for o in self.outs if _is_tensor(o)]

    def function(self, scope: Scope, differentiable: bool) -> Callable[..., list[Any]]:
        """``(*arguments, *leaves, *states) -> [*results, *written states]`` over arrays.

        Args:
            scope: the leaves and storages, in the order in which the function takes them.
            differentiable: whether gradients may be asked for.
        """
        if not differentiable or not any(g for _, g in self.tensors):
            return functools.partial(self._values, scope)
        return self._with_gradients(scope)

    def _values(self, scope: Scope, *arrays: Any) -> list[Any]:
        n = len(self.arguments)
        given = scope.given(arrays[n:])
        with jax.enable_x64(True):
            inside, _, outs, _ = self._run(arrays[:n], given)
            values = [inside.read(t) for t in outs if type(t) is Tensor]
            states = [inside.values.get(s, given[s]) for s in scope.written]
        inside.closed = True
        return [*map(_strong, values), *map(_strong, states)]

    def _with_gradients(self, scope: Scope) -> Callable[..., list[Any]]:
        chosen = [i for i, (_, g) in enumerate(self.tensors) if g]
        n, m = len(self.arguments), len(self.arguments) + len(scope.leaves) + len(scope.storages)
        wanted: list[int] = []  # positions of the inputs that have a gradient

        def joint(*arrays: Any) -> list[Any]:
            given = scope.given(arrays[n:m])
            inside, inputs, outs, _ = self._run(arrays[:n], given)
            tensors = [t for t in outs if type(t) is Tensor]
            with executing(inside):
                values = [_strong(inside.read(t)) for t in tensors]
                states = [_strong(inside.values.get(s, given[s])) for s in scope.written]
                by = [(i, t) for i, t in enumerate([*inputs, *scope.leaves]) if t.requires_grad]
                cotangents = [
                    inside.given(a, self.tensors[i][0], False) for a, i in zip(arrays[m:], chosen, strict=True)
                ]
                found: Any = torch.autograd.grad(
                    [tensors[i] for i in chosen], [t for _, t in by], cotangents, allow_unused=True
                )
                pairs = [(i, inside.read(g)) for (i, _), g in zip(by, found, strict=True) if g is not None]
            inside.closed = True
            wanted[:] = [i for i, _ in pairs]
            return [*values, *states, *[_strong(g) for _, g in pairs]]

        metas = [
            *self.arguments,
            *[(dense(t._m), True) for t in scope.leaves],
            *[(s.geometry, False) for s in scope.storages],
        ]
        avals = [jax.ShapeDtypeStruct(meta.shape, meta.jax_dtype) for meta, _ in metas]
        avals += [jax.ShapeDtypeStruct(self.tensors[i][0].shape, self.tensors[i][0].jax_dtype) for i in chosen]
        with jax.enable_x64(True):
            closed = jax.make_jaxpr(joint)(*avals)
        return _custom(closed, m, len(self.tensors) + len(scope.written), chosen, wanted)


def _custom(
    closed: Any, n_inputs: int, n_results: int, chosen: list[int], wanted: list[int]
) -> Callable[..., list[Any]]:
    """The two halves of a recorded forward and backward as a `jax.custom_vjp`."""
    jaxpr = closed.jaxpr
    constants, inputs, cotangents = jaxpr.constvars, jaxpr.invars[:n_inputs], jaxpr.invars[n_inputs:]
    whole = jaxpr.replace(
        constvars=[],
        invars=[*constants, *jaxpr.invars],
        debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )
    halves = split(whole, [*constants, *inputs], cotangents, n_results, set())

    @jax.custom_vjp
    def function(*arrays: Any) -> list[Any]:
        return jax.core.eval_jaxpr(halves.forward, [], *arrays)[:n_results]

    def forward(*arrays: Any) -> Any:
        outs = jax.core.eval_jaxpr(halves.forward, [], *arrays)
        return outs[:n_results], ([arrays[i] for i in halves.kept_inputs], outs[n_results:])

    def backward(kept: Any, grads: Any) -> Any:
        found = jax.core.eval_jaxpr(halves.backward, [], *kept[0], *kept[1], *[conj(grads[i]) for i in chosen])
        result: list[Any] = [None] * (len(constants) + n_inputs)
        for i, g in zip(wanted, found, strict=True):
            result[len(constants) + i] = conj(g)
        return tuple(result)

    function.defvjp(forward, backward)
    return lambda *arrays: _wide(function, *closed.consts, *arrays)


def _wide(fn: Callable[..., Any], *arrays: Any) -> Any:
    with jax.enable_x64(True):
        return fn(*arrays)


class Scope:
    """What several functions use without being given it, in one order: leaf tensors, then storages."""

    def __init__(self, regions: Sequence[Region]):
        self.leaves: list[Tensor] = list({id(t): t for r in regions for t in r.leaves}.values())
        bases = {t._s for t in self.leaves if t._v is None}
        self.storages = list(dict.fromkeys(s for r in regions for s in (*r.storages, *r.written) if s not in bases))
        self.written = list(dict.fromkeys(s for r in regions for s in r.written))

    def given(self, arrays: Sequence[Any]) -> dict[Storage, Any]:
        """Which array stands for which storage."""
        n = len(self.leaves)
        found = {t._s: a for t, a in zip(self.leaves, arrays[:n], strict=True) if t._v is None}
        found.update(zip(self.storages, arrays[n:], strict=True))
        return found

    def states(self) -> list[Any]:
        """The payloads of the storages now."""
        return [_array(state.executor.load(s)) for s in self.storages]

    def place(self, storage: Storage) -> int:
        """Where the storage is among leaves and storages."""
        if storage in self.storages:
            return len(self.leaves) + self.storages.index(storage)
        return next(i for i, t in enumerate(self.leaves) if t._v is None and t._s is storage)


def _array(value: Any) -> Any:
    if isinstance(value, jax.Array):
        return value
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return jax.numpy.array(np.asarray(value))


def _strong(x: Any) -> Any:
    return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x


def conj(x: Any) -> Any:
    """JAX and torch disagree about the gradient of complex numbers by a conjugate."""
    return jax.numpy.conj(x) if jax.numpy.iscomplexobj(x) else x


def _is_tensor(out: Any) -> bool:
    return type(out) is tuple and len(out) == 2 and type(out[0]) is TensorMeta


# ---------------------------------------------------------------------- tensors that functions close over
def cells_of(*functions: Any) -> list[Any]:
    """Closure cells that hold a tensor with a gradient history: it must become an operand."""
    found: dict[int, Any] = {}
    queue, seen = list(functions), set()
    while queue:
        f = queue.pop()
        if id(f) in seen:
            continue
        seen.add(id(f))
        if isinstance(f, functools.partial):
            queue += [f.func, *f.args, *f.keywords.values()]
        elif isinstance(f, types.MethodType):
            queue.append(f.__func__)
        elif isinstance(f, types.FunctionType):
            for cell in f.__closure__ or ():
                with contextlib.suppress(ValueError):  # not filled yet
                    x = cell.cell_contents
                    if type(x) is Tensor and x.requires_grad and not x.is_leaf:
                        found[id(cell)] = cell
                    elif callable(x):
                        queue.append(x)
    return list(found.values())


@contextlib.contextmanager
def holding(cells: Sequence[Any], tensors: Sequence[Any]) -> Iterator[None]:
    """Within, the cells hold other tensors."""
    before = [c.cell_contents for c in cells]
    for c, t in zip(cells, tensors, strict=True):
        c.cell_contents = t
    try:
        yield
    finally:
        for c, t in zip(cells, before, strict=True):
            c.cell_contents = t


__all__ = ["Inside", "Region", "Scope", "cells_of", "conj", "holding"]
