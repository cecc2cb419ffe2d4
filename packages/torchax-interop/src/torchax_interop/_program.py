"""One recorded call as an XLA program, and how it is called again."""

from __future__ import annotations

import dataclasses
import gc
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import torch
from torch._C import _functions
from torchax import convert, errors
from torchax._execute import executing
from torchax._execute.strict import STRICT
from torchax._storage import Storage, TensorMeta, dense_meta, meta_of
from torchax.tensor import Tensor, make, wrap

from . import _optim as _optim
from ._enter import jax_factories
from ._guards import Guards
from ._reach import reachable_tensors
from ._recording import Recording, concrete, noting_modules
from ._split import split, swallowed
from ._tree import Known, Spec, broadcast_prefix, flatten, unflatten

_grad_of = operator.attrgetter("grad")
_EMBED = 1024  # constants of up to this many elements are compiled in


@dataclasses.dataclass(eq=False)
class Group:
    """Arguments that share a storage: one input of the program.

    Attributes:
        kind: ``tensor`` (one tensor, by value), ``storage`` (several tensors, the whole payload), ``cpu``, ``array``.
        members: positions among the leaves.
    """

    kind: str
    members: list[int]

    def value(self, leaves: list[Any]) -> Any:
        """The array to pass."""
        leaf = leaves[self.members[0]]
        if self.kind == "tensor":
            return leaf._s.value if leaf._v is None else STRICT.read(leaf)
        if self.kind == "array":
            return leaf
        return leaf._s.value if self.kind == "storage" else convert.to_array(leaf, 0)

    def store(self, leaves: list[Any], value: Any) -> None:
        """Write the argument back."""
        leaf = leaves[self.members[0]]
        if self.kind == "tensor":
            STRICT.write(leaf, value)
        elif self.kind == "storage":
            STRICT.store(leaf._s, value)
        else:
            with torch.no_grad():
                leaf.copy_(convert.to_torch(np.asarray(value)))


def group_leaves(leaves: list[Any]) -> list[Group]:
    """The inputs that the leaves make."""
    groups: list[Group] = []
    by_storage: dict[Storage, Group] = {}
    for i, x in enumerate(leaves):
        if type(x) is Tensor:
            known = by_storage.get(x._s)
            if known is None:
                known = by_storage[x._s] = Group("tensor", [])
                groups.append(known)
            known.members.append(i)
            if len(known.members) > 1:
                known.kind = "storage"
        elif isinstance(x, torch.Tensor):
            groups.append(Group("cpu", [i]))
        elif isinstance(x, jax.Array):
            groups.append(Group("array", [i]))
    return groups


@dataclasses.dataclass
class Options:
    """How programs are compiled: donation and layout.

    Attributes:
        donate_state: overwrite the buffers of captured tensors that the function writes.
        donate: whether the leaf at a position may be overwritten.
        in_shardings: for each leaf its sharding, or None.
        out_shardings: a prefix of the nest of results, or None.
        jit: further options of `jax.jit`.
    """

    donate_state: bool = True
    donate: Callable[[int], bool] = lambda i: False
    in_shardings: list[Any] | None = None
    out_shardings: Any = None
    jit: dict[str, Any] = dataclasses.field(default_factory=dict)


class Swallowed(Exception):
    """Captured tensors became constants of a function inside: record again with them as inputs."""

    def __init__(self, storages: list[Storage]):
        self.storages = storages


def record(
    fn: Callable[..., Any], leaves: list[Any], spec: Spec, options: Options, known: list[Tensor]
) -> tuple[Program, list[Any]]:
    """Record a call, compile it and run it; gives the program and the results of this first run.

    Args:
        fn: the function.
        leaves: the leaves of its ``(args, kwargs)``.
        spec: their nest.
        options: how to compile.
        known: parameters that earlier recordings met.
    """
    explicit: list[Storage] = []
    while True:
        try:
            return _Recorder(fn, leaves, spec, options, explicit, known).run()
        except Swallowed as found:
            explicit += found.storages


class _Recorder:
    """Records one call."""

    def __init__(
        self,
        fn: Callable[..., Any],
        leaves: list[Any],
        spec: Spec,
        options: Options,
        explicit: list[Storage],
        known: list[Tensor],
    ):
        self.fn, self.leaves, self.spec, self.options, self.explicit = fn, leaves, spec, options, explicit
        self.groups = group_leaves(leaves)
        self.recording = Recording()
        self.grads: dict[int, tuple[torch.Tensor, Any]] = {
            id(t): (t, t.grad) for t in reachable_tensors(fn, leaves, known)
        }
        self.cotangents: list[Storage] = []
        self.roots: list[Tensor | int] = []  # tensors from outside, or positions among the leaves

    def run(self) -> tuple[Program, list[Any]]:
        recording = self.recording
        try:
            with jax.enable_x64(True):
                arrays = [g.value(self.leaves) for g in self.groups]
                with executing(recording), noting_modules(recording), jax_factories(self._index()):
                    closed = jax.make_jaxpr(self.body)(*[_array(s.value) for s in self.explicit], *arrays)
            lost = swallowed(closed.jaxpr, {id(a) for a in recording.captured.values()})
            if lost:
                raise Swallowed([s for s, a in recording.captured.items() if id(a) in lost])
            program = Program(self, closed)
            outs = program.execute(self.leaves)
        except BaseException:
            self.restore()
            raise
        finally:
            recording.closed = True
        return program, outs

    def restore(self) -> None:
        """Python's state as before the call (tensors have not been touched)."""
        recording = self.recording
        for undo in reversed(recording.undo):
            undo()
        for module, _, buffers in recording.modules.values():
            for name, old in buffers.items():
                new = module._buffers.get(name)
                if type(new) is Tensor and new._s.owner is recording:
                    module._buffers[name] = old
        for t in recording.tensors.values():
            if id(t) not in self.grads and type(t.grad) is Tensor and t.grad._s.owner is recording:
                t.grad = None
        for t, grad in self.grads.values():
            if t.grad is not grad:
                t.grad = grad

    def _index(self) -> int:
        return next((x._m.index for x in self.leaves if type(x) is Tensor), 0)

    # ------------------------------------------------------------------ inside of make_jaxpr
    def body(self, *arrays: Any) -> list[Any]:
        recording = self.recording
        n = len(self.explicit)
        recording.captured.update(zip(self.explicit, arrays[:n], strict=True))
        inner = self._inner_leaves(arrays[n:])
        self.same = {id(x): i for i, x in enumerate(inner) if isinstance(x, torch.Tensor)}
        objects: list[Any] = []
        args, kwargs = unflatten(self.spec, iter(inner), objects)
        result = self.fn(*args, **kwargs)
        del args, kwargs
        recording.finish_random()
        self._keep_buffers()
        known = {id(o): k for k, o in enumerate(objects)}
        outs: list[Any] = []
        self.out_spec = flatten((result, [dict(o.__dict__) for o in objects]), outs, known)
        if self.options.out_shardings is not None:
            outs = self._shard(outs, flatten(result, []))
        del result, objects
        grads = self._differentiate(outs, inner)
        return self._outputs(outs, inner, grads)

    def _inner_leaves(self, arrays: Any) -> list[Any]:
        """What stands for the arguments inside."""
        inner = list(self.leaves)
        self.inner_storages: list[Storage | None] = []
        self.originals: list[Any] = list(arrays)
        for group, array in zip(self.groups, arrays, strict=True):
            first = self.leaves[group.members[0]]
            if group.kind == "array":
                inner[group.members[0]] = array
                self.inner_storages.append(None)
                continue
            if group.kind == "storage":
                storage = Storage(array, first._s.geometry)
            else:
                storage = Storage(array, self._value_meta(first))
            storage.owner = self.recording
            self.inner_storages.append(storage)
            for i in group.members:
                leaf = self.leaves[i]
                t = make(storage, leaf._m, leaf._v) if group.kind == "storage" else make(storage, storage.geometry)
                if leaf.requires_grad and not torch.is_inference_mode_enabled():
                    t.requires_grad_()
                if isinstance(leaf, torch.nn.Parameter):
                    t._is_param = True  # type: ignore[attr-defined]
                inner[i] = t
            if group.kind == "storage" or (group.kind == "tensor" and first._v is None):
                self.recording.given[first._s] = storage
        return inner

    @staticmethod
    def _value_meta(leaf: torch.Tensor) -> TensorMeta:
        if type(leaf) is Tensor and leaf._v is None:
            return leaf._m
        index = leaf._m.index if type(leaf) is Tensor else 0
        strides = tuple(torch.empty_like(leaf, device="meta").stride())
        return meta_of(tuple(leaf.shape), strides, leaf.dtype, index)

    def _keep_buffers(self) -> None:
        """``module.buffer = new value`` counts as a write into the buffer, so that the next call reads it."""
        recording = self.recording
        for module, _, buffers in recording.modules.values():
            for name, old in buffers.items():
                new = module._buffers.get(name)
                if new is old or type(new) is not Tensor or type(old) is not Tensor or new._m is not old._m:
                    continue
                if new._s.owner is recording and not new.requires_grad:
                    recording.write(old, recording.read(new))
                    module._buffers[name] = old

    def _shard(self, outs: list[Any], spec: Spec) -> list[Any]:
        shardings = broadcast_prefix(
            self.options.out_shardings, spec, lambda s: s is None or isinstance(s, jax.sharding.Sharding)
        )
        for i, sharding in enumerate(shardings):
            if sharding is not None and type(outs[i]) is Tensor:
                outs[i] = wrap(
                    jax.lax.with_sharding_constraint(self.recording.read(outs[i]), sharding), _dense(outs[i]._m)
                )
        return outs

    def _differentiate(self, outs: list[Any], inner: list[Any]) -> list[Any]:
        """Gradients of the results by everything that requires one, given cotangents that become inputs."""
        self.differentiable = []
        if not torch.is_grad_enabled():
            return []
        chosen = [i for i, t in enumerate(outs) if type(t) is Tensor and t.requires_grad and not t.is_leaf]
        given = [i for i, t in enumerate(inner) if type(t) is Tensor and t.requires_grad]
        captured = [t for t in self.recording.tensors.values() if t.requires_grad]
        if not chosen or not (given or captured):
            return []
        storages = [
            Storage(concrete(np.zeros(outs[i]._m.shape, outs[i]._m.jax_dtype)), _dense(outs[i]._m)) for i in chosen
        ]
        cotangents = [make(s, s.geometry) for s in storages]
        try:
            found: Any = torch.autograd.grad(
                [outs[i] for i in chosen], [*captured, *[inner[i] for i in given]], cotangents, allow_unused=True
            )
        except RuntimeError as error:
            if "second time" in str(error):  # the function has called backward itself: its results are just values
                return []
            raise
        self.differentiable, self.cotangents = chosen, storages
        pairs = [(root, g) for root, g in zip([*captured, *given], found, strict=True) if g is not None]
        self.roots = [root for root, _ in pairs]
        return [self.recording.read(g) for _, g in pairs]

    def _outputs(self, outs: list[Any], inner: list[Any], grads: list[Any]) -> list[Any]:
        """Sort the results into recipes; gives the outputs of the jaxpr."""
        recording = self.recording
        inner_groups = {id(s): k for k, s in enumerate(self.inner_storages) if s is not None}
        recipes: list[tuple[Any, ...]] = []
        pending: list[tuple[int, Any, Any]] = []  # recipe, the storage's payload, the tensor's value
        results: list[Any] = []
        for i, t in enumerate(outs):
            if isinstance(t, jax.Array):
                recipes.append(("array", len(results)))
                results.append(t)
            elif type(t) is not Tensor:
                recipes.append(("object", t.index) if type(t) is Known else ("static", t))
            elif i in self.differentiable:
                recipes.append(("differentiable", self.differentiable.index(i)))
                results.append(recording.read(t))
            elif id(t) in self.same:
                recipes.append(("same", self.same[id(t)]))
            elif id(t._s) in inner_groups:
                recipes.append(("given", inner_groups[id(t._s)], t._m, t._v))
            elif t._s.owner is recording:
                value = None if t._v is None else recording.read(t)
                pending.append((i, t._s.value, value))
                recipes.append(("born", t._s.geometry, t._m, t._v))
            elif t._v is None and (id(t) in recording.tensors or isinstance(t, torch.nn.Parameter)):
                recipes.append(("tensor", t))
            else:
                recipes.append(("outside", t._s, t._m, t._v))
        positions = {
            i: k for k, i in enumerate(i for i, r in enumerate(recipes) if r[0] in ("array", "differentiable"))
        }
        self.differentiable_results = [positions[i] for i in self.differentiable]
        self.differentiable_metas = [_dense(outs[i]._m) for i in self.differentiable]
        t = None
        self.grads_after()
        outs.clear()
        inner.clear()
        self.same.clear()
        recording.given.clear()
        recording._views.clear()
        self.given_values = [None if s is None else s.value for s in self.inner_storages]
        survivors = self._survivors()
        by_storage: dict[int, list[int]] = {}
        for i, payload, _ in pending:
            by_storage.setdefault(id(payload), []).append(i)
        shared: dict[int, int] = {}
        for i, payload, value in pending:
            _, geometry, meta, view = recipes[i]
            if len(by_storage[id(payload)]) > 1:
                if id(payload) not in shared:
                    shared[id(payload)] = len(results)
                    results.append(payload)
                recipes[i] = ("shared", shared[id(payload)], geometry, meta, view)
            else:
                recipes[i] = ("value", len(results), meta if view is None else _dense(meta))
                results.append(payload if view is None else value)
        self.recipes, self.survivors = recipes, survivors
        self.written = [s for s, v in recording.values.items() if v is not recording.captured[s]]
        self.changed = [k for k, v in enumerate(self.given_values) if v is not None and v is not self.originals[k]]
        self.counts = (len(results), len(self.written), len(survivors), len(self.changed))
        return [
            *results,
            *[recording.values[s] for s in self.written],
            *[s.value for s in survivors],
            *[self.given_values[k] for k in self.changed],
            *grads,
        ]

    def grads_after(self) -> None:
        """Gradients that the call has set or removed."""
        known = {**{id(t): t for t, _ in self.grads.values()}, **self.recording.tensors}
        self.set_grads, self.surprises = [], 0
        for key, t in known.items():
            before = self.grads.get(key, (t, None))[1]
            if t.is_leaf and t.grad is not before:
                self.set_grads.append((t, t.grad))
                self.surprises += key not in self.grads

    def _survivors(self) -> list[Storage]:
        """Storages made inside that somebody outside still holds."""
        refs = [weakref.ref(s) for s in self.inner_storages if s is not None]
        self.inner_storages.clear()
        grads = {id(g._s) for _, g in self.set_grads if type(g) is Tensor}

        def alive() -> list[Storage]:
            return [s for ref in (*self.recording._born, *refs) if (s := ref()) is not None]

        def has_strangers() -> bool:
            return any(id(s) not in grads for s in alive())

        for generation in (1, 2):  # what only garbage holds does not count
            if has_strangers():
                gc.collect(generation)
        found = alive()
        self.strangers = self.surprises + sum(id(s) not in grads for s in found)
        return found


def _dense(meta: TensorMeta) -> TensorMeta:
    if meta.contiguous:
        return meta
    return meta_of(meta.shape, tuple(torch.empty_like(meta.on_meta()).stride()), meta.dtype, meta.index)


def _array(value: Any) -> Any:
    return value if isinstance(value, jax.Array) else concrete(value)


class Program:
    """A recorded call, compiled.

    Attributes:
        guards: when it may be used.
        settled: the call left nothing new behind but gradients, so that the next one will look the same.
        tensors: parameters that it uses.
    """

    def __init__(self, recorder: _Recorder, closed: Any):
        recording = recorder.recording
        self.recipes, self.out_spec = recorder.recipes, recorder.out_spec
        self.groups, self.changed = recorder.groups, recorder.changed
        self.written, self.survivors, self.set_grads = recorder.written, recorder.survivors, recorder.set_grads
        self.graded, self.graded_with = [t for t, _ in self.set_grads], [g for _, g in self.set_grads]
        self.counts, self.roots = recorder.counts, recorder.roots
        self.differentiable_results = recorder.differentiable_results
        self.differentiable_metas = recorder.differentiable_metas
        self.numbers = [[group, name, storage, float(group[name])] for group, name, storage in recording.numbers]
        self.in_shardings = recorder.options.in_shardings
        self.settled = not recorder.strangers
        self.tensors = list(recording.tensors.values())
        relevant = {id(t) for t, _ in self.set_grads} | {
            key for key, (_, g) in recorder.grads.items() if type(g) is Tensor and g._s in recording.captured
        }
        self.guards = Guards(recording, {k: v for k, v in recorder.grads.items() if k in relevant})
        self.guards.replaced = {
            i: recorder.leaves[i]._s
            for g in self.groups
            if g.kind in ("tensor", "storage")
            for i in g.members
            if recorder.leaves[i]._s in recording.given_read
        }
        self.tensor_leaves = [i for g in self.groups if g.kind in ("tensor", "storage") for i in g.members]
        self._build(recorder, closed)

    def _build(self, recorder: _Recorder, closed: Any) -> None:
        """Constants that are captured tensors become inputs; the rest is compiled in, or passed where it is large."""
        recording, jaxpr = recorder.recording, closed.jaxpr
        storage_of = {id(a): s for s, a in recording.captured.items()}
        cotangent_of = {id(s.value): s for s in recorder.cotangents}
        inputs, cotangents, self.storages, self.constants, embedded = [], {}, [], [], {}
        for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
            if id(const) in cotangent_of:
                cotangents[cotangent_of[id(const)]] = var
            elif id(const) in storage_of:
                self.storages.append(storage_of[id(const)])
                inputs.append(var)
        n_explicit = len(recorder.explicit)
        self.storages += recorder.explicit
        inputs += jaxpr.invars[:n_explicit]
        captured = len(inputs)
        for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
            if id(const) in cotangent_of or id(const) in storage_of:
                continue
            if np.size(const) > _EMBED:
                self.constants.append(const)
                inputs.append(var)
            else:
                embedded[var] = const
        n_constants = len(inputs) - captured
        inputs += jaxpr.invars[n_explicit:]
        written = set(self.written)
        donated = [i for i, s in enumerate(self.storages) if s in written] if recorder.options.donate_state else []
        first_argument = captured + n_constants
        donate = recorder.options.donate
        donated += [
            first_argument + k
            for k, g in enumerate(self.groups)
            if g.kind != "cpu" and all(donate(i) for i in g.members)
        ]
        jit = recorder.options.jit
        flat = _Flat(jaxpr, embedded)
        if not recorder.differentiable:
            self.halves = None
            self._run = jax.jit(flat.function(inputs, jaxpr.outvars), donate_argnums=donated, **jit)
            return
        n = sum(self.counts)
        given_away = {inputs[i] for i in donated}
        variables = [*inputs, *embedded]
        order = [cotangents.get(s) for s in recorder.cotangents]
        self.given_cotangents = [v is not None for v in order]  # one that no gradient depends on is not a constant
        present = [v for v in order if v is not None]
        halves = split(flat.without_constants(), variables, present, n, given_away)
        self.halves = halves
        few = list(embedded.values())
        self.kept = [i for i in halves.kept_inputs if i < len(inputs)]
        kept_embedded = [few[i - len(inputs)] for i in halves.kept_inputs if i >= len(inputs)]
        n_kept = len(self.kept)
        self._run = jax.jit(lambda *a: jax.core.eval_jaxpr(halves.forward, [], *a, *few), donate_argnums=donated, **jit)
        self._backward = jax.jit(
            lambda *a: jax.core.eval_jaxpr(halves.backward, [], *a[:n_kept], *kept_embedded, *a[n_kept:])
        )

    # ------------------------------------------------------------------ calls
    def execute(self, leaves: list[Any]) -> list[Any]:
        """Run it; gives the results."""
        for number in self.numbers:
            value = number[0][number[1]]
            if value is not number[3] and float(value) != number[3]:
                number[3] = float(value)
                number[2].value = np.float64(number[3])
        arrays = [s.value for s in self.storages]
        arrays += self.constants
        if self.in_shardings is None:
            arrays += [g.value(leaves) for g in self.groups]
        else:
            arrays += [_placed(g.value(leaves), self.in_shardings[g.members[0]]) for g in self.groups]
        if self.halves is None:
            with jax.enable_x64(True):
                outs = self._run(*arrays)
            found: Any = ()
        else:
            call = _Call(self, arrays)
            roots = [leaves[r] if type(r) is int else r for r in self.roots]
            found = Differentiable.apply(call, *roots)
            outs = call.outs
        self._write_back(leaves, outs)
        return self._results(leaves, outs, found)

    def _write_back(self, leaves: list[Any], outs: Any) -> None:
        n_results, n_written, n_survivors, n_changed = self.counts
        end = n_results + n_written
        for storage, value in zip(self.written, outs[n_results:end], strict=True):
            storage.value = value
            storage.version += 1
        for storage, value in zip(self.survivors, outs[end : end + n_survivors], strict=True):
            storage.value = value
            storage.version += 1
            storage.owner = None
        end += n_survivors
        for k, value in zip(self.changed, outs[end : end + n_changed], strict=True):
            self.groups[k].store(leaves, value)
        if not all(map(operator.is_, map(_grad_of, self.graded), self.graded_with)):
            for t, grad in self.set_grads:
                t.grad = grad

    def _results(self, leaves: list[Any], outs: Any, found: Any) -> list[Any]:
        results: list[Any] = []
        shared: dict[int, Storage] = {}
        for recipe in self.recipes:
            kind = recipe[0]
            if kind == "value":
                results.append(make(Storage(outs[recipe[1]], recipe[2]), recipe[2]))
            elif kind == "static" or kind == "tensor":
                results.append(recipe[1])
            elif kind == "differentiable":
                results.append(found[recipe[1]])
            elif kind == "same":
                results.append(leaves[recipe[1]])
            elif kind == "outside":
                results.append(make(*recipe[1:]))
            elif kind == "array":
                results.append(outs[recipe[1]])
            elif kind == "shared":
                _, k, geometry, meta, view = recipe
                if k not in shared:
                    shared[k] = Storage(outs[k], geometry)
                results.append(make(shared[k], meta, view))
            elif kind == "object":
                results.append(Known(recipe[1]))
            else:
                results.append(self._argument_alias(leaves, *recipe[1:]))
        return results

    def _argument_alias(self, leaves: list[Any], k: int, meta: TensorMeta, view: Any) -> Tensor:
        """A view of an argument; of a copy where the argument is itself a view, or on CPU."""
        group = self.groups[k]
        leaf = leaves[group.members[0]]
        if group.kind == "storage" or (group.kind == "tensor" and leaf._v is None):
            return make(leaf._s, meta, view)
        value = group.value(leaves)
        geometry = dense_meta(tuple(value.shape), leaf.dtype, meta.index)
        return make(Storage(jnp.copy(value), geometry), meta, view)

    def misfit(self, leaves: list[Any]) -> str | None:
        """Why it cannot serve a call with these leaves, or None."""
        return self.guards.failure(leaves, self.tensor_leaves)


def _placed(value: Any, sharding: Any) -> Any:
    return value if sharding is None else jax.device_put(value, sharding)


class _Flat:
    """A jaxpr as functions of chosen variables; the small constants are in it."""

    def __init__(self, jaxpr: Any, embedded: dict[Any, Any]):
        self.jaxpr, self.embedded = jaxpr, embedded

    def without_constants(self) -> Any:
        return self.jaxpr.replace(
            constvars=[], invars=[*self.jaxpr.constvars, *self.jaxpr.invars], debug_info=_no_names(self.jaxpr)
        )

    def function(self, inputs: list[Any], outvars: list[Any]) -> Callable[..., Any]:
        few = list(self.embedded.values())
        jaxpr = self.jaxpr.replace(
            constvars=[], invars=[*inputs, *self.embedded], outvars=outvars, debug_info=_no_names(self.jaxpr)
        )
        return lambda *arrays: jax.core.eval_jaxpr(jaxpr, [], *arrays, *few)


def _no_names(jaxpr: Any) -> Any:
    return jaxpr.debug_info._replace(arg_names=None, result_paths=None)


_ONCE = (
    "a compiled function cannot be differentiated twice from outside; compute the second derivative inside of the compiled "
    "function, or call the function that is not compiled"
)


class _Call:
    """One run of a differentiable program."""

    def __init__(self, program: Program, arrays: list[Any]):
        self.program, self.arrays = program, arrays
        self.outs: Any = None
        self.kept: list[Any] = []


class Differentiable(torch.autograd.Function):
    """A program as a node of torch's graph; its backward is the other half of the recording."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *roots: torch.Tensor) -> Any:  # type: ignore[override]
        program = call.program
        with jax.enable_x64(True):
            outs = program._run(*call.arrays)
        n = sum(program.counts)
        ctx.program = program
        ctx.kept = [call.arrays[i] for i in program.kept] + list(outs[n:])
        call.outs, call.arrays = outs[:n], []
        ctx.metas = [r._m if type(r) is Tensor else r for r in roots]
        return tuple(
            [
                wrap(outs[i], meta)
                for i, meta in zip(program.differentiable_results, program.differentiable_metas, strict=True)
            ]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        program = ctx.program
        given = [g.jax() for g, used in zip(grads, program.given_cotangents, strict=True) if used]
        with jax.enable_x64(True):
            found = program._backward(*ctx.kept, *given)
        out: list[Any] = []
        for g, root in zip(found, ctx.metas, strict=True):
            out.append(wrap(g, _dense(root)) if type(root) is TensorMeta else convert.to_torch(np.asarray(g)))
        if torch.is_grad_enabled():  # create_graph: the gradients are there, theirs are not
            refuse = _functions.DelayedError(_ONCE, len(out))
            refused = refuse(*[g.requires_grad_() for g in out])
            out = [refused] if len(out) == 1 else list(refused)
        return None, *out


def assemble(program: Program, results: list[Any], objects: list[Any]) -> Any:
    """The nest of results; mutable objects among the arguments get the attributes that they have after the call."""
    filled: Iterator[Any] = iter([objects[x.index] if type(x) is Known else x for x in results])
    result, attributes = unflatten(program.out_spec, filled)
    for x, values in zip(objects, attributes, strict=True):
        x.__dict__.clear()
        x.__dict__.update(values)
    return result


__all__ = ["Group", "Options", "Program", "assemble", "errors", "group_leaves", "record"]
