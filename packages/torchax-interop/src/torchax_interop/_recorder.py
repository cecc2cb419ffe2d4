"""Records a call of a torch function: what its program takes, gives and changes."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
import torch
from torchax._execute import executing
from torchax._storage import Storage, TensorMeta, meta_of
from torchax.tensor import Tensor, make, wrap

from ._enter import jax_factories
from ._groups import Options, dense, group_leaves
from ._layout import is_source
from ._optim import groups_before, refuse_schedulers
from ._program import Program
from ._reach import Places, reachable_tensors
from ._recording import NotDifferentiable, Recording, concrete, noting_modules
from ._split import swallowed
from ._tree import Known, Spec, broadcast_prefix, flatten, unflatten


class Swallowed(Exception):
    """Captured tensors became constants of a function inside: record again with them as inputs."""

    def __init__(self, storages: list[Storage]):
        self.storages = storages


def record(
    fn: Callable[..., Any],
    leaves: list[Any],
    spec: Spec,
    options: Options,
    known: list[Tensor],
    use: Callable[[Program, list[Any]], Any] = Program.execute,
    explicit: Sequence[Storage] = (),
) -> tuple[Program, Any]:
    """Record a call, compile it and run it; gives the program and the results of this first run.

    Args:
        fn: the function.
        leaves: the leaves of its ``(args, kwargs)``.
        spec: their nest.
        options: how to compile.
        known: parameters that earlier recordings met.
        use: what is done with the program in place of running it; Python's state is then as before the call, unless it
            is rehearsed.
        explicit: storages that are inputs of the program whether they are used or not; those without values must be.
    """
    inputs = list(explicit)
    while True:
        try:
            return Recorder(fn, leaves, spec, options, inputs, known).run(use)
        except Swallowed as found:
            inputs += found.storages


class Recorder:
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
        self.places = Places(fn)
        self.places.plain.remember()
        self.recording.groups = groups_before(
            [*self.places.optimizers, *(x for x in leaves if isinstance(x, torch.optim.Optimizer))]
        )
        self.on_cpu = [
            (name, t, t._version) for m in self.places.modules for name, t in m.named_buffers() if type(t) is not Tensor
        ]
        self.grads: dict[int, tuple[torch.Tensor, Any]] = {
            id(t): (t, t.grad) for t in reachable_tensors(fn, leaves, known)
        }
        self.cotangents: list[Storage] = []
        self.roots: list[Tensor | int] = []  # tensors from outside, or positions among the leaves
        self.argument_grads: list[int] = []  # positions among the leaves, of whose gradients are the last results

    def run(self, use: Callable[[Program, list[Any]], Any]) -> tuple[Program, Any]:
        recording = self.recording
        refuse_schedulers()
        try:
            with jax.enable_x64(True):
                arrays = [g.value(self.leaves) for g in self.groups]
                with executing(recording), noting_modules(recording), jax_factories(self._index()), _heap_aside():
                    closed = jax.make_jaxpr(self.body)(*[_array(s.value) for s in self.explicit], *arrays)
            lost = swallowed(closed.jaxpr, {id(a) for a in recording.captured.values()})
            if lost:
                raise Swallowed([s for s, a in recording.captured.items() if id(a) in lost])
            program = Program(self, closed)
            outs = use(program, self.leaves)
            if use not in (Program.execute, Program.rehearse):
                self.restore()
        except BaseException:
            self.restore()
            raise
        finally:
            recording.closed = True
        return program, outs

    def written_on_cpu(self) -> list[str]:
        """Buffers on CPU that the call has written, by name."""
        return [name for name, t, version in self.on_cpu if t._version != version]

    def restore(self) -> None:
        """Python's state as before the call (tensors have not been touched)."""
        recording = self.recording
        for undo in reversed(recording.undo):
            undo()
        for noted in recording.modules.values():
            module = noted.module
            for name, old in noted.buffers.items():
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
        self.argument_grads = [i for i, t in enumerate(inner) if type(t) is Tensor and t.is_leaf and t.grad is not None]
        outs += [inner[i].grad.detach() for i in self.argument_grads]
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
        for noted in recording.modules.values():
            module = noted.module
            for name, old in noted.buffers.items():
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
                    jax.lax.with_sharding_constraint(self.recording.read(outs[i]), sharding), dense(outs[i]._m)
                )
        return outs

    def _differentiate(self, outs: list[Any], inner: list[Any]) -> list[Any]:
        """Gradients of the results by everything that requires one, given cotangents that become inputs."""
        self.differentiable = []
        self.refused: tuple[str, list[int]] | None = None
        self.bases = {i: base for i, t in enumerate(outs) if (base := self._base(t)) is not None}
        if not torch.is_grad_enabled():
            return []
        chosen = [
            i
            for i, t in enumerate(outs)
            if type(t) is Tensor and t.requires_grad and not t.is_leaf and i not in self.bases
        ]
        given = [i for i, t in enumerate(inner) if type(t) is Tensor and t.requires_grad]
        captured = [t for t in self.recording.tensors.values() if t.requires_grad]
        captured += self.recording.computed.values()
        if not chosen or not (given or captured):
            return []
        storages = [
            Storage(concrete(np.zeros(outs[i]._m.shape, outs[i]._m.jax_dtype)), dense(outs[i]._m)) for i in chosen
        ]
        cotangents = [make(s, s.geometry) for s in storages]
        try:
            computed = self.recording.computed.values()
            roots = [*captured, *[inner[i] for i in given]]
            with cut_behind(computed):  # the graph behind them stays for whoever calls backward
                found: Any = torch.autograd.grad(
                    [outs[i] for i in chosen], roots, cotangents, retain_graph=bool(computed), allow_unused=True
                )
        except NotDifferentiable as error:  # which matters only if somebody asks for the gradient
            self.refused = str(error), chosen
            return []
        except RuntimeError as error:
            if "second time" in str(error):  # the function has called backward itself: its results are just values
                return []
            raise
        self.differentiable, self.cotangents = chosen, storages
        pairs = [(root, g) for root, g in zip([*captured, *given], found, strict=True) if g is not None]
        self.roots = [root for root, _ in pairs]
        return [self.recording.read(g) for _, g in pairs]

    def _base(self, t: Any) -> Tensor | int | None:
        """What a result that requires a gradient is a view of: a tensor from outside, or the position of an argument."""
        base: Any = t._base if type(t) is Tensor else None
        if type(base) is not Tensor:
            return None
        if base._s.owner is None:
            self.recording.note(base)  # nothing else reads it
        if not t.requires_grad or t.dtype != base.dtype or t.is_conj() or t.is_neg():
            return None
        if base._s.owner is None:
            return base
        at = self.same.get(id(base))
        if at is None or not base.is_leaf:
            return None
        leaf = self.leaves[at]
        return at if type(leaf) is Tensor and leaf._s in self.recording.given else None

    def _outputs(self, outs: list[Any], inner: list[Any], grads: list[Any]) -> list[Any]:
        """Sort the results into recipes; gives the outputs of the jaxpr."""
        recording = self.recording
        inner_groups = {id(s): k for k, s in enumerate(self.inner_storages) if s is not None}
        recipes: list[tuple[Any, ...]] = []
        pending: list[tuple[int, Any, Any]] = []  # recipe, the storage's payload, the tensor's value
        results: list[Any] = []
        for i, t in enumerate(outs):
            if type(t) is Tensor and t._v is not None and t._v.is_traced:  # outside, nobody knows where it lies
                t = outs[i] = self._copied(t)
            if isinstance(t, jax.Array):
                recipes.append(("array", len(results)))
                results.append(t)
            elif type(t) is not Tensor:
                recipes.append(("object", t.index) if type(t) is Known else ("static", t))
            elif i in self.bases:
                recipes.append(("view", self.bases[i], tuple(t.shape), t.stride(), t.storage_offset()))
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
        self.differentiable_metas = [dense(outs[i]._m) for i in self.differentiable]
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
                recipes[i] = ("value", len(results), meta if view is None else dense(meta))
                results.append(payload if view is None else value)
        self.recipes, self.survivors = recipes, survivors
        self.written = [s for s, v in recording.values.items() if v is not recording.captured[s]]
        self.written.sort(key=is_source, reverse=True)  # the others are held, see `_held`
        self.changed = [k for k, v in enumerate(self.given_values) if v is not None and v is not self.originals[k]]
        self.counts = (len(results), len(self.written), len(survivors), len(self.changed))
        return [
            *results,
            *[recording.values[s] for s in self.written],
            *[s.value for s in survivors],
            *[self.given_values[k] for k in self.changed],
            *grads,
        ]

    def _copied(self, t: Tensor) -> Tensor:
        storage = Storage(self.recording.read(t), dense(t._m))
        storage.owner = self.recording
        self.recording.bear(storage)
        return make(storage, storage.geometry)

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

        if any(id(s) not in grads for s in alive()):
            gc.collect()  # what only garbage holds does not count
        found = alive()
        self.strangers = self.surprises + sum(id(s) not in grads for s in found)
        return found


@contextlib.contextmanager
def cut_behind(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within, gradients end at these `tensors`: what they were computed from, and is asked for as well, gets its own share alone.

    torch hands a node's gradient to whoever asked for it before the node's hooks run; these leave nothing to go on with.
    """
    nodes: set[Any] = {t.grad_fn for t in tensors}
    handles = [node.register_prehook(lambda grads: (None,) * len(grads)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _heap_aside() -> Iterator[None]:
    """Within, a garbage collection looks at what was made within: all objects of torch, jax and a model take a third of a second."""
    if gc.get_freeze_count():  # the program's own doing, or a recording around this one
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _array(value: Any) -> Any:
    return value if isinstance(value, jax.Array | jax.ShapeDtypeStruct) else concrete(value)
