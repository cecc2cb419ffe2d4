"""A recorded forward with its backward, as two programs: what the second needs of the first is handed over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

# computed again in the backward rather than kept: they cost less than the memory
_CHEAP = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "expand_dims",
        "iota",
        "neg",
        "reshape",
        "squeeze",
        "transpose",
        "copy",
        "not",
        "stop_gradient",
    }
)


@dataclasses.dataclass
class Halves:
    """Two jaxprs.

    Attributes:
        forward: (inputs without cotangents) -> results, then what the backward needs of them.
        backward: (what it needs of the inputs, what the forward gave for it, cotangents) -> gradients.
        kept_inputs: positions, among the forward's inputs, of those that the backward needs.
    """

    forward: Any
    backward: Any
    kept_inputs: list[int]


def split(
    jaxpr: Any, inputs: Sequence[Any], cotangents: Sequence[Any], n_results: int, overwritten: set[Any]
) -> Halves:
    """Split `jaxpr`, whose last outputs are gradients.

    Args:
        jaxpr: without constants.
        inputs: its variables that are inputs of the forward.
        cotangents: those that are cotangents.
        n_results: how many outputs belong to the forward.
        overwritten: inputs whose buffers the forward gives away.
    """
    results, gradients = jaxpr.outvars[:n_results], jaxpr.outvars[n_results:]
    tainted = set(cotangents)
    clean = []
    for e in jaxpr.eqns:
        if any(v in tainted for v in _variables(e.invars)):
            tainted.update(e.outvars)
        else:
            clean.append(e)
    live = set(_variables(results))
    forward_ids = set()
    for e in reversed(clean):
        if e.effects or any(o in live for o in e.outvars):
            forward_ids.add(id(e))
            live.update(_variables(e.invars))
    defined_by = {o: e for e in jaxpr.eqns if id(e) in forward_ids for o in e.outvars}

    needed, backward_ids = set(_variables(gradients)), set()
    for e in reversed(jaxpr.eqns):
        outs = [o for o in e.outvars if o in needed]
        acts = e.effects and id(e) not in forward_ids  # a print of a gradient
        if acts or (outs and (id(e) not in forward_ids or e.primitive.name in _CHEAP)):
            backward_ids.add(id(e))
            needed.difference_update(outs)
            needed.update(_variables(e.invars))
    given = set(cotangents)
    from_inputs = [v for v in inputs if v in needed and v not in overwritten]
    from_forward = [v for v in needed if v in defined_by or v in overwritten]
    assert needed <= given | set(from_inputs) | set(from_forward)
    info = jaxpr.debug_info
    forward = _jaxpr(list(inputs), [*results, *from_forward], [e for e in jaxpr.eqns if id(e) in forward_ids], info)
    backward = _jaxpr(
        [*from_inputs, *from_forward, *cotangents],
        list(gradients),
        [e for e in jaxpr.eqns if id(e) in backward_ids],
        info,
    )
    position = {v: i for i, v in enumerate(inputs)}
    return Halves(forward, backward, [position[v] for v in from_inputs])


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [a for a in atoms if not isinstance(a, core.Literal)]


def _jaxpr(invars: list[Any], outvars: list[Any], eqns: list[Any], info: Any) -> Any:
    effects = frozenset().union(*[e.effects for e in eqns]) if eqns else frozenset()
    return core.Jaxpr([], invars, outvars, eqns, effects, info._replace(arg_names=None, result_paths=None))


def swallowed(jaxpr: Any, wanted: set[int]) -> set[int]:
    """Ids out of `wanted` that are constants of functions inside the jaxpr (a nested `jit` keeps what it closes over)."""
    found: set[int] = set()
    stack = [jaxpr]
    while stack:
        for e in stack.pop().eqns:
            for value in jax.tree.leaves(
                list(e.params.values()), is_leaf=lambda v: isinstance(v, (core.ClosedJaxpr, core.Jaxpr))
            ):
                if isinstance(value, core.ClosedJaxpr):
                    found.update(id(c) for c in value.consts if id(c) in wanted)
                    stack.append(value.jaxpr)
                elif isinstance(value, core.Jaxpr):
                    stack.append(value)
    return found
