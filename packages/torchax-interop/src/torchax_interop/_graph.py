"""A graph of ATen ops evaluated on `jax.Array`s whose dimensions may be symbols.

Tensors have sizes that are numbers. To export a program for any batch size, a graph that torch has made with symbolic
sizes is evaluated lowering by lowering; which lowering serves an op, and which dtypes take part, is read from the
graph's own metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import torch
import torch.fx
from torch.utils._pytree import tree_flatten, tree_map
from torchax import convert, dtypes, errors
from torchax._lower import lowered
from torchax._registry import REGISTRY
from torchax._signature import DROPPED

_VIEWS = ("view", "views")


class NotServed(Exception):
    """No lowering's conditions hold: the op has to be taken apart."""

    def __init__(self, op: Any):
        super().__init__(str(op))
        self.op = op


class ArrayInterpreter(torch.fx.Interpreter):
    """Evaluates a functional graph on arrays."""

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            try:
                return self._run(n, n.target, tuple(map(_plain, args)), {k: _plain(v) for k, v in kwargs.items()})
            except (NotServed, errors.TorchaxError):
                raise
            except Exception as error:
                raise errors.LoweringError(
                    f"{n.target} cannot be exported with dimensions of unknown size: {type(error).__name__}: {error}. "
                    "Export it for fixed shapes, or rewrite that part of the model"
                ) from error
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator):
            raise errors.LoweringError(
                f"{n.target} cannot be exported with dimensions of unknown size; export the program for fixed shapes"
            )
        return super().run_node(n)

    def _run(self, n: torch.fx.Node, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op is torch.ops.aten.sym_size.int:
            return args[0].shape[args[1]]
        entries = REGISTRY.lowerings(op)
        if op is torch.ops.aten.slice.Tensor:
            return _slice(*args)
        if (
            op is torch.ops.aten.clone.default
            or op is torch.ops.aten.alias.default
            or op is torch.ops.aten.detach.default
        ):
            return args[0]
        if op is torch.ops.aten._to_copy.default:
            dtype = kwargs.get("dtype")
            return args[0] if dtype is None else convert.cast(args[0], dtypes.to_jax(dtype))
        if entries and entries[0].kind in _VIEWS:
            return _view(op, entries[0], args, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in DROPPED}
        given = [(_on_meta(a), _structs(a)) for a in (n.args, n.kwargs)]
        meta_args, meta_kwargs = given[0][0], {k: v for k, v in given[1][0].items() if k not in DROPPED}
        shapes = (given[0][1], {k: v for k, v in given[1][1].items() if k not in DROPPED})
        first = next((x for x in tree_flatten((meta_args, meta_kwargs))[0] if isinstance(x, torch.Tensor)), None)
        dtype = first.dtype if first is not None else kwargs.get("dtype")
        entry = REGISTRY.resolve(op, convert.platform(0), dtype, shapes) if entries else None
        if (
            entry is not None and entry.platforms and entry.when is not None
        ):  # a kernel, which wants sizes to be numbers
            entry = REGISTRY.resolve(op, convert.EVERY_PLATFORM, dtype, shapes)
        if entry is None or entry.kind != "functional" or entry.random or entry.writes:
            raise NotServed(op)
        if entry.prepare is not None:
            return _made(op, entry, args, kwargs, n.meta["val"])
        args = tuple(map(_as_value, args, op._schema.arguments))
        out = lowered(op, entry, meta_args, meta_kwargs, None)(args, kwargs)
        return _cast(out, n.meta["val"])


def _made(op: Any, entry: Any, args: tuple[Any, ...], kwargs: dict[str, Any], want: Any) -> Any:
    """A factory, whose arguments are numbers or symbols."""
    if any(jax.export.is_symbolic_dim(a) for a in args):
        if op._schema.name != "aten::arange":
            raise NotServed(op)
        return jnp.arange(*args, dtype=dtypes.to_jax(want.dtype))
    prepared = entry.prepare(*args, **kwargs)
    if prepared is None:
        raise ValueError(f"{op} refused {args}")
    static, operands = prepared
    return _cast(entry.fn(*static, *operands), want)


def _as_value(x: Any, argument: Any) -> Any:
    """A symbol that the op computes with, rather than uses as a size, as an array."""
    computed = str(argument.type) in ("number", "Tensor", "Optional[number]", "Optional[Tensor]")
    return jnp.asarray(x) if computed and jax.export.is_symbolic_dim(x) else x


def _plain(x: Any) -> Any:
    """Arguments as a dispatcher hands them over: plain lists."""
    return [_plain(y) for y in x] if isinstance(x, list | tuple) else x


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    end = None if isinstance(end, int) and end >= 2**62 else end
    index = [slice(None)] * x.ndim
    index[dim] = slice(start, end, step)
    return x[tuple(index)]


def _view(op: Any, entry: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, rest = args[0], args[1:]
    defaults = [(a.name, a.default_value) for a in op._schema.arguments[1:] if not a.kwarg_only]
    rest = rest + tuple(kwargs.get(name, default) for name, default in defaults[len(rest) :])
    if entry.kind == "views":
        calls = entry.fn(x.shape, *rest)
        return [
            _slice(x, *a) if o is torch.ops.aten.slice.Tensor else _view(o, REGISTRY.lowerings(o)[0], (x, *a), {})
            for o, *a in calls
        ]
    if entry.prepare is not None:
        prepared = entry.prepare(x.shape, (0,) * x.ndim, *rest)
        if prepared is None:
            raise ValueError(f"{rest} for shape {list(x.shape)}")
        static, positions, _ = prepared
        return entry.fn(x, *static, *positions)
    return entry.fn(x, *[tuple(a) if isinstance(a, list) else a for a in rest])


def _hint(n: Any) -> int:
    return n if isinstance(n, int) else int(n.node.hint)


def _fake(x: Any) -> Any:
    return x.meta.get("val") if isinstance(x, torch.fx.Node) else x


def _on_meta(args: Any) -> Any:
    """The call on tensors without values, of sizes that stand for the unknown ones: for type promotion."""

    def one(x: Any) -> Any:
        x = _fake(x)
        if isinstance(x, torch.Tensor):
            return torch.empty([_hint(s) for s in x.shape], dtype=x.dtype, device="meta")
        return _hint(x) if isinstance(x, torch.SymInt) else x

    return tree_map(one, _unlisted(args))


def _structs(args: Any) -> Any:
    """The call as predicates of lowerings see it."""

    def one(x: Any) -> Any:
        x = _fake(x)
        if isinstance(x, torch.Tensor):
            return jax.ShapeDtypeStruct(tuple(_hint(s) for s in x.shape), dtypes.to_jax(x.dtype))
        return _hint(x) if isinstance(x, torch.SymInt) else x

    return tree_map(one, _unlisted(args))


def _unlisted(x: Any) -> Any:
    """fx's own lists and dicts as plain ones."""
    if isinstance(x, dict):
        return {k: _unlisted(v) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(map(_unlisted, x))
    return [_unlisted(y) for y in x] if isinstance(x, list) else x


def _cast(out: Any, want: Any) -> Any:
    if isinstance(want, list | tuple):
        return tuple(None if o is None else _cast(o, w) for o, w in zip(out, want, strict=False))
    if not isinstance(want, torch.Tensor) or out is None:
        return out
    dtype = dtypes.to_jax(want.dtype)
    out = out if isinstance(out, jax.Array) else jnp.asarray(out, dtype)
    return out if out.dtype == np.dtype(dtype) else convert.cast(out, dtype)


_ASSERTIONS = ("aten::_assert", "aten::sym_constrain", "aten::_functional_assert", "aten::_functional_sym_constrain")


def without_assertions(graph_module: torch.fx.GraphModule, device: torch.device | None = None) -> torch.fx.GraphModule:
    """A copy of the graph, and of those in it, without checks of sizes; factories name `device`."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in list(graph.nodes):
        name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
        if name.startswith(_ASSERTIONS):
            graph.erase_node(node)
        elif device is not None and node.op == "call_function" and node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    clean = torch.fx.GraphModule(graph_module, graph)
    for name, branch in clean.named_children():  # of torch.cond, bodies of loops
        if isinstance(branch, torch.fx.GraphModule):
            setattr(clean, name, without_assertions(branch, device))
    return clean


def taken_apart(program: Any, run: Callable[[Any], Any]) -> Any:
    """``run`` of the program in which every op that has a lowering is one node; those that it finds not served are taken apart."""
    from torch.export import default_decompositions

    apart: set[Any] = set()
    while True:
        table = default_decompositions()
        for op in list(table.keys()):
            if op not in apart and (entries := REGISTRY.lowerings(op)) and entries[0].kind in ("functional", *_VIEWS):
                table.pop(op)
        try:
            return run(program.run_decompositions(table))
        except NotServed as found:
            if found.op in apart or found.op not in default_decompositions():
                raise errors.OperatorNotFound(
                    f"{found.op} cannot be exported with dimensions of unknown size: no lowering over arrays alone serves it, and "
                    "torch cannot decompose it. Export it for fixed shapes"
                ) from None
            apart.add(found.op)
