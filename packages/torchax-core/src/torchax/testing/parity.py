"""Whether an operator gives on device jax what it gives on CPU, in all its forms."""

from __future__ import annotations

import collections
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from . import forms as value_forms
from . import samples as _samples
from .aliasing import assert_aliasing_of
from .cases import FORMS, Case
from .compare import Mismatch
from .engine import describe, run_sample
from .mutation import attempt, brief
from .operators import Operator, Tolerance, operator
from .samples import Inapplicable, Sample

DEFAULT_FORMS = ("forward", "aliasing", "noncontiguous", "inplace", "out", "view", "grad", "jit", "vmap")
ALL_FORMS = (*FORMS, "aliasing")


def assert_parity(
    op: Any,
    samples: Iterable[Any],
    *,
    forms: Iterable[str] | str | None = None,
    reference: Callable[..., Any] | None = None,
    tolerances: Mapping[torch.dtype, tuple[float, float]] | None = None,
    values: bool = True,
) -> dict[str, int]:
    """Raise unless `op` does on device jax what it does on CPU, for every sample in every form.

    Compared are structure, dtypes, shapes, strides and values of the results; what is written, in-place and through
    ``out=``; which results share memory with an input; gradients; the compiled and the batched call; and errors by
    their class.

    Args:
        op: an overload (``torch.ops.aten.add.Tensor``), its name (``"aten::add.Tensor"``), an operator made with
            `torch.library.custom_op`, or any function of tensors.
        samples: the calls, on CPU: tuples of positional arguments, single tensors, `sample(...)` with keywords, or
            OpInfo's ``SampleInput``.
        forms: one or several of `FORMS` and ``"aliasing"``; None for those in `DEFAULT_FORMS` that the operator has. A form
            that is named must apply to one sample at least.
        reference: what is called in place of `op` for tensors on CPU, for an operator that has no CPU kernel.
        tolerances: ``{dtype: (rtol, atol)}`` where those of `torch.testing` are too narrow. Beyond them a result passes
            where it is about as near to the result in double precision as CPU's.
        values: False for random results, of which metadata is compared.

    Returns:
        How many samples were compared, by form.

    Raises:
        Mismatch: an AssertionError that lists what differs, or says that nothing was compared.
        ValueError: no operator of that name, no such form, a sample that is not on CPU.
    """
    given = [forms] if isinstance(forms, str) else forms
    chosen = list(DEFAULT_FORMS if given is None else given)
    if unknown := set(chosen) - set(ALL_FORMS):
        raise ValueError(f"no form {', '.join(sorted(unknown))}; there are {', '.join(ALL_FORMS)}")
    tolerance = {dtype: Tolerance(*pair) for dtype, pair in (tolerances or {}).items()}
    target = operator(op, reference=reference, values=values, tolerances=tolerance)
    if given is None and importlib.util.find_spec("torchax_interop") is None:
        chosen.remove("jit")
    calls = [_samples.as_sample(x) for x in samples]
    if not calls:
        raise Mismatch(f"{target.full_name}: there are no samples, so nothing was compared")
    compared: collections.Counter[str] = collections.Counter()
    failures, passed_over = [], {}
    for i, call in enumerate(calls):
        refused = _refused(target, call)
        for form in chosen:
            try:
                if refused and form not in ("forward", "errors"):
                    raise Inapplicable(refused)
                _compare(target, form, call)
                compared[form] += 1
            except Inapplicable as reason:
                passed_over.setdefault(form, str(reason))
            except Exception as error:
                compared[form] += 1
                failures.append(f"  {form}, sample {i}: {describe(error)}{_hint(error, target)}")
    if failures:
        raise Mismatch(f"{target.full_name} differs from CPU:\n" + "\n".join(failures))
    must = ["forward"] if given is None else chosen
    for form in must:
        if not compared[form]:
            raise Mismatch(f"{target.full_name}: form {form!r} applies to no sample: {passed_over[form]}")
    return dict(compared)


def _compare(op: Operator, form: str, call: Sample) -> None:
    if form == "aliasing":
        assert_aliasing_of(op, call)
        return
    if (form == "inplace" and op.inplace_variant is None) or (form == "out" and not op.supports_out):
        raise Inapplicable(f"torch has no {form} form of {op.full_name}")
    if form == "method":
        raise Inapplicable("of methods nothing is known; name a function that calls it")
    described = value_forms.VALUE_FORMS.get(form)
    if described is not None and described.requires_grad:
        call = call.map(_differentiable)
    dtype = next((t.dtype for t in call.tensors()), None)
    torch.manual_seed(_samples.SEED)
    run_sample(Case(op, form, dtype), call)


def _refused(op: Operator, call: Sample) -> str:
    """Why CPU torch refuses a call; empty if it takes it."""
    here = _samples.fresh(call)
    error = attempt(lambda: op(here.input, *here.args, **here.kwargs)).error
    return "" if error is None else f"CPU torch: {brief(error)}"


def _differentiable(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()):
        return x if x.requires_grad else x.detach().requires_grad_()
    return x


def _hint(error: Exception, op: Operator) -> str:
    if "for CPU's NotImplementedError" in str(error) and op.reference is None:
        return ". For an operator without a CPU kernel pass reference=, a function over CPU tensors"
    return ""
