"""One recorded call as an XLA program, and how it is called again."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import torch
from torch._C import _functions
from torchax import convert, errors
from torchax._execute._where import donated, user_line
from torchax._marks import marks
from torchax._storage import Storage, TensorMeta, dense_meta
from torchax.tensor import Tensor, make, wrap

from . import _optim as _optim
from ._groups import dense
from ._guards import Guards, plain_attributes
from ._held import Held
from ._layout import is_source, laid_out, output_layout, settle_source
from ._spares import shape_of, spares_of, values_of, zeros_like
from ._split import split
from ._tree import Known, unflatten

if TYPE_CHECKING:
    from ._recorder import Recorder

_grad_of = operator.attrgetter("grad")
_EMBED = 1024  # constants of up to this many elements are compiled in


class Program:
    """A recorded call, compiled.

    Attributes:
        guards: when it may be used.
        changed_numbers: names of Python numbers, and of buffers on CPU, that the call has changed.
        settled: the call left nothing new behind but gradients, so that the next one will look the same.
        tensors: parameters that it uses.
        mesh: the devices that it runs on, where they are several.
        sources: states of random numbers that it uses.
        spares: gradients that it makes anew, with their parameters: it writes over the last ones.
    """

    mesh: Any
    sources: list[Storage]

    def __init__(self, recorder: Recorder, closed: Any):
        recording = recorder.recording
        self.recipes, self.out_spec = recorder.recipes, recorder.out_spec
        self.groups, self.changed = recorder.groups, recorder.changed
        self.written, self.survivors, self.set_grads = recorder.written, recorder.survivors, recorder.set_grads
        self.lasting = [*(s for s in self.written if not is_source(s)), *self.survivors]
        self.held = Held(self.lasting)
        self.graded, self.graded_with = [t for t, _ in self.set_grads], [g for _, g in self.set_grads]
        self.looked: Any = None  # the mark under which gradients were last in place
        self.counts, self.roots = recorder.counts, recorder.roots
        self.differentiable_results = recorder.differentiable_results
        self.differentiable_metas = recorder.differentiable_metas
        self.refused = recorder.refused
        self.argument_grads = recorder.argument_grads
        # what the function itself sets after a step
        lost = [n for n in recording.numbers if n.group.get(n.name) is not n.recorded]
        recording.settings += [(n.group, n.name, n.recorded) for n in lost]
        self.numbers = recording.numbers = [n for n in recording.numbers if n not in lost]
        self.in_shardings = recorder.options.in_shardings
        self.settled = not recorder.strangers
        self.tensors = list(recording.tensors.values())
        made = set(self.survivors)
        for t, grad in self.set_grads:  # a gradient lies where its parameter does
            if type(t) is Tensor and type(grad) is Tensor and grad._m.shape == t._m.shape and grad._s in made:
                grad._s.sharding = t._s.sharding
        relevant = {id(t) for t, _ in self.set_grads} | {
            key for key, (_, g) in recorder.grads.items() if type(g) is Tensor and g._s in recording.captured
        }
        recorder.places.only(lambda t: type(t) is Tensor and t._s in recording.captured)
        self.changed_numbers = [*recorder.places.plain.settle(), *recorder.written_on_cpu()]
        grads = {k: v for k, v in recorder.grads.items() if k in relevant}
        self.guards = Guards(recording, grads, recorder.places)
        self.guards.replaced = {
            i: recorder.leaves[i]._s
            for g in self.groups
            if g.kind in ("tensor", "storage")
            for i in g.members
            if recorder.leaves[i]._s in recording.given_read
        }
        self.tensor_leaves = [i for g in self.groups if g.kind in ("tensor", "storage") for i in g.members]
        self._build(recorder, closed)

    def _build(self, recorder: Recorder, closed: Any) -> None:
        """Constants that are captured tensors become inputs; the rest is compiled in, or passed where it is large."""
        recording, jaxpr = recorder.recording, closed.jaxpr
        storage_of = {id(a): s for s, a in recording.captured.items()}
        cotangent_of = {id(s.value): s for s in recorder.cotangents}
        cotangents, captures, self.constants, embedded = {}, [], [], {}
        for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
            if id(const) in cotangent_of:
                cotangents[cotangent_of[id(const)]] = var
            elif id(const) in storage_of:
                captures.append((storage_of[id(const)], var))
        n_explicit = len(recorder.explicit)
        used = {id(v) for v in jaxpr.outvars}.union(*({id(v) for v in eqn.invars} for eqn in jaxpr.eqns))
        captures += [(s, v) for s, v in zip(recorder.explicit, jaxpr.invars, strict=False) if id(v) in used]
        place = {s: i for i, s in enumerate(self.lasting)}
        captures.sort(key=lambda pair: place.get(pair[0], len(place)))  # those that are held first, see `_arrays`
        self.storages, inputs = [s for s, _ in captures], [var for _, var in captures]
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
        layout = output_layout(self, recorder)
        self.spares = spares_of(self, recorder)
        n_held = sum(s in place for s in self.storages)
        self.state, self.others = self.storages[:n_held], self.storages[n_held:]
        held = [place[s] for s in (*self.state, *(s for s, _ in self.spares))]
        self.held_inputs: Any = slice(len(held)) if held == list(range(len(held))) else held
        self.guards.watch_layout(self.storages)
        inputs += jaxpr.invars[n_explicit:]
        written = set(self.written)
        donated = [i for i, s in enumerate(self.storages) if s in written] if recorder.options.donate_state else []
        first_argument = captured + n_constants
        donate = recorder.options.donate
        overwritten = set(self.changed) if recorder.options.donate_state else set()
        self.donated_arguments = [
            first_argument + k
            for k, g in enumerate(self.groups)
            if g.kind != "cpu" and (k in overwritten or all(donate(i) for i in g.members))
        ]
        donated += self.donated_arguments
        given_away = {inputs[i] for i in donated}
        # what is held is one argument, of whose arrays all are overwritten: JAX takes a list faster than many arguments
        nested = lambda i: max(i - n_held + 1, 0)
        self.donated_arguments = list(map(nested, self.donated_arguments))
        donated = sorted(set(map(nested, donated)).union([0] if self.spares else []))
        jit = recorder.options.jit
        flat = _Flat(jaxpr, embedded)
        if not recorder.differentiable:
            self.halves = None
            pinned = laid_out(layout, len(jaxpr.outvars))
            run = flat.function(inputs, jaxpr.outvars, n_held)
            self._run = jax.jit(run, donate_argnums=donated, keep_unused=bool(self.spares), **pinned, **jit)
            return
        n = sum(self.counts)
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
        pinned = laid_out(layout, len(halves.forward.outvars))
        forward = lambda state, *a: jax.core.eval_jaxpr(halves.forward, [], *state, *a, *few)
        self._run = jax.jit(forward, donate_argnums=donated, **pinned, **jit)
        self._backward = jax.jit(
            lambda *a: jax.core.eval_jaxpr(halves.backward, [], *a[:n_kept], *kept_embedded, *a[n_kept:])
        )

    # ------------------------------------------------------------------ calls
    def execute(self, leaves: list[Any]) -> list[Any]:
        """Run it; gives the results."""
        arrays = self._arrays(leaves)
        if self.donated_arguments:
            self._make_distinct(arrays)
        if self.halves is None:
            try:
                with jax.enable_x64(True):
                    outs = self._run(*arrays)
            except (RuntimeError, ValueError) as error:
                raise _explained(error, _flattened(arrays)) from error
            found: Any = ()
        else:
            call = _Call(self, arrays)
            roots = [leaves[r] if type(r) is int else r for r in self.roots]
            found = Differentiable.apply(call, *roots)
            outs = call.outs
        self._write_back(leaves, outs)
        results = self._results(leaves, outs, found)
        if self.argument_grads:
            self._accumulate(leaves, results)
        return results

    def lower(self, leaves: list[Any]) -> jax.stages.Lowered:
        """Its XLA program for these arguments, not run."""
        with jax.enable_x64(True):
            return self._run.lower(*self._arrays(leaves, shape_of))

    def lower_for(
        self, leaves: list[Any], platform: str, sharding: Any
    ) -> tuple[jax.stages.Lowered, Any, set[Storage]]:
        """Its XLA program for devices that are not here, its jaxpr, and the storages that it reads.

        What has values is laid out there as `sharding` says.
        """
        abstract = lambda x: (
            x
            if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
            else jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)
        )
        with jax.enable_x64(True):
            traced = self._run.trace(*jax.tree.map(abstract, self._arrays(leaves, shape_of)))
            lowered = traced.lower(lowering_platforms=(platform,))
        return lowered, traced.jaxpr.jaxpr, {*self.storages, *(s for s, _ in self.spares)}

    def rehearse(self, leaves: list[Any]) -> None:
        """As `execute`, of tensors without values: what stays after the call gets a shape, a dtype and a layout."""
        with jax.enable_x64(True):
            outs = self._run.eval_shape(*self._arrays(leaves, shape_of))
        begin = self.counts[0] + self.counts[1]
        for storage, value in zip(self.survivors, outs[begin : begin + self.counts[2]], strict=True):
            storage.value = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=storage.sharding)
            storage.owner = None
        for t, grad in self.set_grads:
            t.grad = grad

    def _arrays(self, leaves: list[Any], spare: Callable[[Any], Any] = zeros_like) -> list[Any]:
        """The arguments of the XLA program, of which the first is a list of what it holds between calls.

        A gradient that no call has left yet is what `spare` makes of its parameter's payload.
        """
        for number in self.numbers:
            if number.group[number.name] is not number.seen:
                number.refresh()
        for source in self.sources:
            settle_source(source, self.mesh)
        held, chosen = self.held.arrays, self.held_inputs
        if held is None:
            arrays: list[Any] = [[*(s.value for s in self.state), *values_of(self.spares, spare)]]
        else:
            arrays = [held[chosen] if type(chosen) is slice else [held[i] for i in chosen]]
        arrays += [s.value for s in self.others]
        arrays += self.constants
        if self.in_shardings is None:
            arrays += [g.value(leaves) for g in self.groups]
        else:
            arrays += [_placed(g.value(leaves), self.in_shardings[g.members[0]]) for g in self.groups]
        return arrays

    def _make_distinct(self, arrays: list[Any]) -> None:
        """An argument that is overwritten may be passed as something else, too: it then gives a copy away."""
        counts = collections.Counter(map(id, _flattened(arrays)))
        for i in self.donated_arguments:
            if counts[id(arrays[i])] > 1:
                arrays[i] = jnp.copy(arrays[i])

    def _write_back(self, leaves: list[Any], outs: Any) -> None:
        n_results, n_written, n_survivors, n_changed = self.counts
        end = n_results + n_written + n_survivors
        begin = end - len(self.lasting)
        for storage, value in zip(self.written, outs[n_results:begin], strict=False):  # states of random numbers
            storage.value = value
            storage.version += 1
        if not self.held.keep(outs[begin:end]):
            for storage, value in zip(self.lasting, outs[begin:end], strict=True):
                storage.value = value
                storage.version += 1
                storage.owner = None
        for k, value in zip(self.changed, outs[end : end + n_changed], strict=True):
            self.groups[k].store(leaves, value)
        if not self.graded or self.looked is marks.grads:
            return
        self.looked = marks.grads
        with plain_attributes():
            same = all(map(operator.is_, map(_grad_of, self.graded), self.graded_with))
        if not same:
            for t, grad in self.set_grads:
                t.grad = grad

    def _accumulate(self, leaves: list[Any], results: list[Any]) -> None:
        """Arguments get the gradients that the function has computed by `backward`: the last of the results."""
        n = len(results) - len(self.argument_grads)
        given = [leaves[i] for i in self.argument_grads]
        torch.autograd.backward(given, [g.to(t.device) for t, g in zip(given, results[n:], strict=True)])
        del results[n:]

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
            elif kind == "view":  # torch's own, so that it has a gradient and the writes of both are seen by both
                _, base, *geometry = recipe
                results.append(torch.as_strided(leaves[base] if type(base) is int else base, *geometry))
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
        if self.refused is not None:
            message, positions = self.refused
            for i in positions:
                results[i] = _functions.DelayedError(message, 1)(results[i].requires_grad_())
        return results

    def _argument_alias(self, leaves: list[Any], k: int, meta: TensorMeta, view: Any) -> Tensor:
        """A view of an argument; of a copy where the argument is itself a view, or on CPU."""
        group = self.groups[k]
        leaf = leaves[group.members[0]]
        if group.kind == "storage" or (group.kind == "tensor" and leaf._v is None):
            return make(leaf._s, meta, view)
        value = group.value(leaves)
        geometry = dense_meta(tuple(value.shape), leaf.dtype, meta.index)
        with jax.enable_x64(True):
            return make(Storage(jnp.array(value), geometry), meta, view)

    def misfit(self, leaves: list[Any]) -> str | None:
        """Why it cannot serve a call with these leaves, or None."""
        return self.guards.failure(leaves, self.tensor_leaves)


def _explained(error: Exception, arrays: list[Any], begin: str = "") -> Exception:
    """The exception to raise for one of JAX's."""
    gone = donated(arrays)
    return error if gone is None else errors.BufferDonated(f"{begin}{gone}{user_line()}")


def _flattened(arrays: list[Any]) -> list[Any]:
    return [*arrays[0], *arrays[1:]]


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

    def function(self, inputs: list[Any], outvars: list[Any], n: int) -> Callable[..., Any]:
        """It takes a list, of whose arrays the first `n` are read, and the other arrays."""
        few = list(self.embedded.values())
        jaxpr = self.jaxpr.replace(
            constvars=[], invars=[*inputs, *self.embedded], outvars=outvars, debug_info=_no_names(self.jaxpr)
        )
        return lambda state, *arrays: jax.core.eval_jaxpr(jaxpr, [], *state[:n], *arrays, *few)


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
        try:
            with jax.enable_x64(True):
                outs = program._run(*call.arrays)
        except (RuntimeError, ValueError) as error:
            raise _explained(error, _flattened(call.arrays)) from error
        n = sum(program.counts)
        ctx.program = program
        inputs = _flattened(call.arrays)
        ctx.kept = [inputs[i] for i in program.kept] + list(outs[n:])
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
        try:
            with jax.enable_x64(True):
                found = program._backward(*ctx.kept, *given)
        except (RuntimeError, ValueError) as error:
            raise _explained(
                error, ctx.kept, "the backward of a compiled function needs a value that is gone: "
            ) from error
        out: list[Any] = []
        for g, root in zip(found, ctx.metas, strict=True):
            out.append(wrap(g, dense(root)) if type(root) is TensorMeta else convert.to_torch(np.asarray(g)))
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
