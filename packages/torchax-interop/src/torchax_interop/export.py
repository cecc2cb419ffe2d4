"""Programs that leave: `torch.export` to StableHLO and `jax.export`, saved, loaded and run where there is no torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import torch
import torch.fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchax import convert, dtypes, errors
from torchax.tensor import Tensor

from . import _atomic, control_flow
from ._enter import enter, to_array
from ._graph import ArrayInterpreter, taken_apart, without_assertions
from ._tree import tree_map
from .views import torch_view

Weights = dict[str, jax.Array]
_KNOWN = ("cpu", "cuda", "rocm", "tpu")
_FAMILY = {"cuda": "gpu", "rocm": "gpu"}  # JAX's names, that registries of operators do not tell apart
_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_PROGRAM, _WEIGHTS, _ABOUT = "program.jaxexport", "weights.safetensors", "about.json"


# ---------------------------------------------------------------------- to a JAX function
def exported_program_to_jax(program: ExportedProgram) -> tuple[Weights, Callable[..., Any]]:
    """An exported program as JAX sees it.

    Args:
        program: what `torch.export.export` gives, on CPU.

    Returns:
        ``(weights, fn)``: parameters, buffers and constants by name, and ``fn(weights, args, kwargs=None)`` over nests of
        `jax.Array`s, for `jax.jit` and the rest. Updates of buffers that the program makes are dropped, with a warning.

    Raises:
        TypeError: not an exported program.
    """
    _require_exported(program)
    weights = {name: to_array(t.detach()) for name, t in _state_of(program).items()}
    prepared: list[torch.fx.GraphModule] = []

    def fn(weights: Weights, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        args = args if isinstance(args, tuple) else tuple(args) if isinstance(args, list) else (args,)
        flat = _flat_inputs(program, weights, args, kwargs or {})
        if any(not isinstance(n, int) for x in flat if isinstance(x, jax.Array) for n in x.shape):
            return taken_apart(program, lambda p: _evaluate(p, weights, args, kwargs or {}))
        if not prepared:
            prepared.append(without_assertions(program.graph_module, torch.device("jax")))
        with torch.no_grad():
            out = enter(lambda *xs: _run_graph(prepared[0], program, xs), tuple(flat), {})
        return _user_outputs(program, out)

    return weights, fn


def _require_exported(program: Any) -> None:
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"expected a torch.export.ExportedProgram, as torch.export.export(model, args) gives it; got {type(program).__name__}"
        )


def _evaluate(program: ExportedProgram, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weights = {
        **{
            n: to_array(t.detach())
            for n, t in program.constants.items()
            if n not in weights and isinstance(t, torch.Tensor)
        },
        **weights,
    }
    flat = _flat_inputs(program, weights, args, kwargs)
    graph = without_assertions(program.graph_module)
    with jax.enable_x64(True):
        return _user_outputs(program, ArrayInterpreter(graph).run(*flat, enable_io_processing=False))


def _state_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    state = {**program.state_dict, **program.constants}
    wanted = [s.target for s in program.graph_signature.input_specs if s.kind in _STATE]
    return {name: state[name] for name in wanted if name is not None}


def _flat_inputs(
    program: ExportedProgram, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """The inputs of the graph, in its order."""
    leaves, spec = tree_flatten((args, kwargs))
    wanted = program.call_spec.in_spec
    if wanted is not None and spec != wanted:
        if len(leaves) != wanted.num_leaves:
            raise TypeError(f"the program takes {wanted.num_leaves} inputs as {wanted}; got {len(leaves)} as {spec}")
        leaves = tree_flatten((args, {k: kwargs[k] for k in wanted.children()[1].context}))[0] if kwargs else leaves
    given, flat = iter(leaves), []
    for s in program.graph_signature.input_specs:
        if s.kind in _STATE:
            if s.target not in weights:
                raise KeyError(f"the program needs {s.target!r}, which is not among the {len(weights)} weights given")
            flat.append(weights[s.target])
        elif s.kind is InputKind.USER_INPUT:
            x = next(given)
            flat.append(s.arg.value if isinstance(s.arg, ConstantArgument) else x)
        else:
            raise errors.UnsupportedLayout(
                f"an exported program with an input of kind {s.kind.name} cannot become a JAX function"
            )
    return flat


def _user_outputs(program: ExportedProgram, out: Any) -> Any:
    specs = program.graph_signature.output_specs
    found = [
        s.arg.value if isinstance(s.arg, ConstantArgument) else x
        for s, x in zip(specs, out, strict=True)
        if s.kind is OutputKind.USER_OUTPUT
    ]
    spec = program.call_spec.out_spec
    return found if spec is None else tree_unflatten(found, spec)


def _while_loop(test: Any, body: Any, carried: Any, fixed: Any) -> Any:
    return control_flow.while_loop(lambda *x: test(*x, *fixed), lambda *x: body(*x, *fixed), carried)


def _scan(combine: Any, init: Any, xs: Any, fixed: Any) -> Any:
    def step(carry: Any, x: Any) -> Any:
        found = combine(*carry, *x, *fixed)
        return list(found[: len(carry)]), list(found[len(carry) :])

    carry, ys = control_flow.scan(step, list(init), list(xs))
    return [*carry, *ys]


# in a graph, operands and results of control flow are lists of tensors
_CONTROL_FLOW: dict[Any, Any] = {
    torch.ops.higher_order.cond: control_flow.cond,
    torch.ops.higher_order.while_loop: _while_loop,
    torch.ops.higher_order.scan: _scan,
}


class _Interpreter(torch.fx.Interpreter):
    """Evaluates a graph on tensors; control flow becomes XLA's."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(_CONTROL_FLOW.get(target, target), args, kwargs)


def _run_graph(graph: torch.fx.GraphModule, program: ExportedProgram, inputs: tuple[Any, ...]) -> Any:
    """The graph on tensors; says what it updates in vain."""
    before = [t._s.version if type(t) is Tensor else None for t in inputs], [_payload(t) for t in inputs]
    out = _Interpreter(graph).run(*inputs, enable_io_processing=False)
    specs = program.graph_signature.input_specs
    changed = [
        s.target or "an input"
        for s, t, version, payload in zip(specs, inputs, *before, strict=True)
        if type(t) is Tensor and (t._s.version != version or _payload(t) is not payload)
    ]
    if changed:
        warnings.warn(
            f"the program updates {', '.join(changed[:4])}{' and more' if len(changed) > 4 else ''}; a JAX function has no side "
            "effects, so the new values are dropped. Export model.eval() for inference",
            UserWarning,
            stacklevel=2,
        )
    return out


def _payload(t: Any) -> Any:
    return t._s.value if type(t) is Tensor else t


# ---------------------------------------------------------------------- to StableHLO
@dataclasses.dataclass(repr=False)
class Exported:
    """A program in StableHLO with its calling convention, and its weights.

    Attributes:
        program: the `jax.export.Exported`; called with the weights (where they are separate), then the inputs.
        weights: by name; None where they are inside of the program.
    """

    program: jax.export.Exported
    weights: Weights | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it with tensors (gives tensors) or `jax.Array`s (gives those).

        Raises:
            ValueError: other inputs than it was exported for.
        """
        leaves = tree_flatten((args, kwargs))[0]
        arrays, named = tree_map(to_array, args), tree_map(to_array, kwargs)
        with jax.enable_x64(True):
            given = arrays if self.weights is None else (self.weights, *arrays)
            try:
                out = self.program.call(*given, **named)
            except ValueError as error:  # JAX counts the weights as the first argument
                found = [_words(a) for a in jax.tree.leaves((arrays, named)) if hasattr(a, "dtype")]
                raise ValueError(
                    f"the program was exported for the inputs {', '.join(self.inputs) or 'none'}; it was called with "
                    f"{', '.join(found) or 'none'}: {str(error).splitlines()[0]}"
                ) from error
        return torch_view(out) if any(isinstance(x, torch.Tensor) for x in leaves) else out

    def __repr__(self) -> str:
        weights = "weights inside" if self.weights is None else f"{len(self.weights)} weights"
        return f"<Exported for {', '.join(self.platforms)}: inputs {', '.join(self.inputs) or 'none'}; {weights}>"

    @property
    def inputs(self) -> list[str]:
        """Dtype and shape of each input, symbols where sizes are free; the weights are not among them."""
        return [_words(a) for a in self.program.in_avals[len(self.weights or ()) :]]

    def mlir_module(self) -> str:
        """The StableHLO text."""
        return self.program.mlir_module()

    @property
    def platforms(self) -> tuple[str, ...]:
        """What it runs on."""
        return tuple(self.program.platforms)

    def save(self, path: Any) -> None:
        """See `save`."""
        save(self, path)


def _words(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def export(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    weights: str = "separate",
    platforms: Sequence[str] | None = None,
) -> Exported:
    """A model as StableHLO that any JAX program can call, with or without torch.

    Args:
        model: a module on CPU or on device jax (exported with `torch.export` first), or an exported program.
        args: example inputs, for a module.
        kwargs: example keyword inputs, for a module.
        dynamic_shapes: as for `torch.export.export`; dimensions that it names are symbols in the StableHLO, too.
        weights: ``"separate"``: the program takes them as its first argument; ``"inside"``: they are constants in it.
        platforms: those that the program runs on, out of ``cpu``, ``cuda``, ``rocm``, ``tpu``; this machine's if None.

    Raises:
        TypeError: neither a module with a tuple of example inputs nor an exported program.
        ValueError: another value of `weights`, an unknown platform.
        LoweringError, OperatorNotFound: an op cannot be exported with dimensions of unknown size.
    """
    if weights not in ("separate", "inside"):
        raise ValueError(f"weights is 'separate' or 'inside'; got {weights!r}")
    if not isinstance(model, ExportedProgram):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"export takes a torch.nn.Module or an ExportedProgram; got {type(model).__name__}")
        if not isinstance(args, (tuple, list)):
            raise TypeError(
                "exporting a module takes a tuple of example inputs, export(model, (x,)); got "
                f"{'none' if args is None else type(args).__name__}"
            )
        model, args, kwargs = _on_cpu(model), tuple(tree_map(_host, args)), tree_map(_host, kwargs or {})
        model = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    if isinstance(platforms, str) or not set(platforms or ()) <= set(_KNOWN):
        raise ValueError(
            f"platforms is a sequence of names out of {', '.join(_KNOWN)}, as in platforms=('cpu', 'tpu'); got {platforms!r}"
        )
    state, fn = exported_program_to_jax(model)
    specs, named = _input_specs(model)
    chosen = None if platforms is None else tuple(platforms)
    with convert.compiling_for(_lowerings_of(chosen), portable=True), jax.enable_x64(True):
        if weights == "inside":
            run = jax.jit(lambda *a, **k: fn(state, a, k))
            return Exported(jax.export.export(run, platforms=chosen)(*specs, **named), None)
        run = jax.jit(lambda w, *a, **k: fn(w, a, k))
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in state.items()}
        return Exported(jax.export.export(run, platforms=chosen)(shapes, *specs, **named), state)


def _lowerings_of(platforms: tuple[str, ...] | None) -> str:
    """The platform whose lowerings a program for `platforms` gets: with several, those that serve every platform."""
    names = {jax.default_backend()} if platforms is None else {_FAMILY.get(p, p) for p in platforms}
    return names.pop() if len(names) == 1 else convert.EVERY_PLATFORM


def exported_program_to_stablehlo(
    program: ExportedProgram, *, platforms: Sequence[str] | None = None
) -> tuple[Weights, jax.export.Exported]:
    """``(weights, stablehlo)`` of an exported program; ``stablehlo.call(weights, *inputs)`` runs it, ``.mlir_module()`` prints it."""
    _require_exported(program)
    done = export(program, platforms=platforms)
    assert done.weights is not None
    return done.weights, done.program


def _on_cpu(model: torch.nn.Module) -> torch.nn.Module:
    on_jax = any(type(t) is Tensor for t in (*model.parameters(), *model.buffers()))
    return copy.deepcopy(model).cpu() if on_jax else model


def _host(x: Any) -> Any:
    return x.detach().cpu() if type(x) is Tensor else x


def _input_specs(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shapes and dtypes of the user's inputs, symbols where the program has them."""
    scope = jax.export.SymbolicScope(_constraints(program))
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    leaves = []
    for s in program.graph_signature.input_specs:
        if s.kind is not InputKind.USER_INPUT:
            continue
        if isinstance(s.arg, ConstantArgument):
            leaves.append(s.arg.value)
            continue
        value = placeholders[s.arg.name].meta["val"]
        if not isinstance(value, torch.Tensor):
            leaves.append(jax.ShapeDtypeStruct((), dtypes.to_jax(torch.int64)))
            continue
        text = ", ".join(str(n) if isinstance(n, int) else str(n.node.expr) for n in value.shape)
        shape = jax.export.symbolic_shape(text, scope=scope) if text else ()
        leaves.append(jax.ShapeDtypeStruct(shape, dtypes.to_jax(value.dtype)))
    assert program.call_spec.in_spec is not None
    return tree_unflatten(leaves, program.call_spec.in_spec)


def _constraints(program: ExportedProgram) -> list[str]:
    found = []
    for symbol, bounds in program.range_constraints.items():
        lower, upper = bounds.lower, bounds.upper
        if lower.is_Integer and int(lower) > 1:
            found.append(f"{symbol} >= {int(lower)}")
        if upper.is_Integer and int(upper) < 2**31:  # torch's own infinity is a number, too
            found.append(f"{symbol} <= {int(upper)}")
    return found


# ---------------------------------------------------------------------- files
def save(exported: Exported, path: Any) -> None:
    """Write a program into a folder: the StableHLO with its calling convention, and the weights as safetensors.

    All files are written before the first takes the place of one that is there.

    Raises:
        TypeError: not what `export` gives.
        CheckpointError: `path` is a file.
    """
    if not isinstance(exported, Exported):
        raise TypeError(f"save takes what torchax.export.export gives; got {type(exported).__name__}")
    from safetensors.flax import save_file

    folder = pathlib.Path(path)
    if folder.exists() and not folder.is_dir():
        raise errors.CheckpointError(f"an exported program is saved as a folder; {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "platforms": list(exported.program.platforms),
        "weights": None if exported.weights is None else _WEIGHTS,
        "inputs": exported.inputs,
        "outputs": [_words(a) for a in exported.program.out_avals],
    }
    weights = exported.weights
    _atomic.write_files(
        {
            folder / _PROGRAM: lambda draft: draft.write_bytes(exported.program.serialize()),
            **({} if weights is None else {folder / _WEIGHTS: lambda draft: save_file(weights, draft)}),
            folder / _ABOUT: lambda draft: draft.write_text(json.dumps(about, indent=1)),
        }
    )
    if weights is None:
        (folder / _WEIGHTS).unlink(missing_ok=True)


def load(path: Any) -> Exported:
    """Read what `save` has written.

    Raises:
        CheckpointError: there is no such folder, or it does not hold a program.
    """
    from safetensors.flax import load_file

    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise errors.CheckpointError(
            f"{folder} holds no exported program: {'a folder is expected' if folder.exists() else 'it does not exist'}"
        )
    try:
        program = jax.export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
        about = json.loads((folder / _ABOUT).read_text())
        with jax.enable_x64(True):
            weights = None if about["weights"] is None else load_file(folder / about["weights"])
    except FileNotFoundError as error:
        raise errors.CheckpointError(f"{folder} holds no exported program: {error.filename} is missing") from error
    except Exception as error:
        raise errors.CheckpointError(f"{folder} holds no exported program that can be read: {error}") from error
    return Exported(program, weights)


__all__ = ["Exported", "export", "exported_program_to_jax", "exported_program_to_stablehlo", "load", "save"]
