"""Forms whose results are values: how each is computed on either side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils._pytree as pytree

from .. import errors, interop
from . import cases, samples
from .samples import Inapplicable, Sample

Compute = Callable[[Any, Sample], Any]


class ValueForm(NamedTuple):
    """How a form's results come about."""

    cpu: Compute
    jax: Compute | None = None  # as on CPU if None
    prepare: Callable[[Sample], Sample] = lambda sample: sample
    requires_grad: bool = False
    layout: bool = False  # strides are compared


# Calls ------------------------------------------------------------------------------------------------------------


def call(op: Any, sample: Sample) -> Any:
    """The operator as a function."""
    return op(sample.input, *sample.args, **sample.kwargs)


def call_method(op: Any, sample: Sample) -> Any:
    """The operator as a method."""
    return op.method_variant(sample.input, *sample.args, **sample.kwargs)


def call_conjugated(op: Any, sample: Sample) -> Any:
    """The operator on conj views; where there is nothing to conjugate, `prepare` left neg views."""
    return call(op, sample)


def _marked(sample: Sample) -> Sample:
    """Conj and neg views of complex tensors, neg views of real ones."""
    if any(t.is_complex() for t in sample.tensors()):
        return samples.negated(samples.conjugated(sample)) if len(sample.tensors()) > 1 else samples.conjugated(sample)
    return samples.negated(sample)


# Gradients --------------------------------------------------------------------------------------------------------


def _outputs(op: Any, sample: Sample) -> list[torch.Tensor]:
    """The differentiable results of a sample, unique ones where the sample says how."""
    result = op.gradcheck_wrapper(op.get_op(), sample.input, *sample.args, **sample.kwargs)
    leaves = pytree.tree_leaves(sample.process(result))
    outputs = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    if not outputs:
        raise Inapplicable("no result requires a gradient")
    return outputs


def _cotangents(outputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Random cotangents: the same values on every device and in every precision."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for t in outputs:
        value = torch.randn((*t.shape, 2), dtype=torch.float64, generator=generator)
        value = (value * 4).round() / 4  # few digits: rounding makes no difference between the sides
        value = torch.view_as_complex(value) if t.dtype.is_complex else value[..., 0]
        drawn.append(value.to(t.dtype).to(t.device))
    return drawn


def _inputs(sample: Sample) -> list[torch.Tensor]:
    inputs = [t for t in sample.tensors() if t.requires_grad]
    if not inputs:
        raise Inapplicable("no input requires a gradient")
    return inputs


def gradients(op: Any, sample: Sample) -> Any:
    """The gradient of every input that requires one."""
    inputs = _inputs(sample)
    outputs = _outputs(op, sample)
    return torch.autograd.grad(outputs, inputs, _cotangents(outputs, 1), allow_unused=True)


def second_gradients(op: Any, sample: Sample) -> Any:
    """The gradients of the gradients."""
    inputs = _inputs(sample)
    outputs = _outputs(op, sample)
    first = torch.autograd.grad(outputs, inputs, _cotangents(outputs, 1), allow_unused=True, create_graph=True)
    first = [g for g in first if g is not None and g.requires_grad]
    if not first:
        raise Inapplicable("the gradient is constant")
    return torch.autograd.grad(first, inputs, _cotangents(first, 2), allow_unused=True)


def tangents(op: Any, sample: Sample) -> Any:
    """Forward-mode derivatives of every result."""
    _inputs(sample)
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(t.detach(), v) if t.requires_grad else t
            for t, v in zip(sample.tensors(), _cotangents(sample.tensors(), 3), strict=True)
        ]
        dual = sample.with_tensors(duals)
        result = op.gradcheck_wrapper(op.get_op(), dual.input, *dual.args, **dual.kwargs)
        leaves = [t for t in pytree.tree_leaves(sample.process(result)) if isinstance(t, torch.Tensor)]
        unpacked = [forward_ad.unpack_dual(t).tangent for t in leaves if t.is_floating_point() or t.is_complex()]
        return [None if t is None else t.clone() for t in unpacked]


# Transforms -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _data_dependence(op: Any):
    """Operators whose result depends on values in shape may say so, and only they."""
    try:
        yield
    except (errors.DataDependentShape, errors.TracerEscaped) as error:
        if op.full_name not in cases.DATA_DEPENDENT:
            raise
        raise Inapplicable(f"{type(error).__name__}, as it should") from None


def jitted(op: Any, sample: Sample) -> Any:
    """The operator in a compiled function that takes all tensors; the second call, served by the program."""
    tensors = sample.tensors()

    def fn(*tensors: torch.Tensor) -> Any:
        return call(op, sample.with_tensors(list(tensors)))

    with _data_dependence(op):
        compiled = interop.jax_jit(fn)
        compiled(*[t.clone() for t in tensors])
        return compiled(*tensors)


def lowered_for_tpu(op: Any, sample: Sample) -> Any:
    """Nothing: the operator is lowered for TPUs, and not run."""
    tensors = sample.tensors()

    def fn(*tensors: torch.Tensor) -> Any:
        result = call(op, sample.with_tensors(list(tensors)))
        return [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]

    with _data_dependence(op), jax.enable_x64(True):
        arrays = interop.jax_view(tensors)
        jax.jit(interop.jax_view(fn)).trace(*arrays).lower(lowering_platforms=("tpu",))
    return None


def _batched(op: Any, sample: Sample) -> Any:
    """vmap over a batch of two: the sample, and the sample with the float tensors' entries scaled."""
    tensors = sample.tensors()
    if not tensors:
        raise Inapplicable("no tensor")

    def fn(*tensors: torch.Tensor) -> Any:
        return call(op, sample.with_tensors(list(tensors)))

    stacked = [torch.stack([t, t * 0.5 if t.is_floating_point() else t]) for t in tensors]
    try:
        return torch.vmap(fn, randomness="different")(*stacked)
    except AttributeError as error:
        if "_lazy" not in str(error):
            raise
        raise Inapplicable("OpInfo's wrapper, which sets a seed, takes batched tensors for lazy ones") from None


def nothing(op: Any, sample: Sample) -> Any:
    """Of a form that is not compared on CPU."""
    return None


VALUE_FORMS = {
    "forward": ValueForm(call, layout=True),
    "method": ValueForm(call_method, layout=True),
    "noncontiguous": ValueForm(call, prepare=samples.noncontiguous, layout=True),
    "conj_neg": ValueForm(call, prepare=_marked),
    "grad": ValueForm(gradients, requires_grad=True),
    "gradgrad": ValueForm(second_gradients, requires_grad=True),
    "forward_ad": ValueForm(tangents, requires_grad=True),
    "jit": ValueForm(call, jitted),
    "vmap": ValueForm(_batched),
    "tpu": ValueForm(nothing, lowered_for_tpu),
}
