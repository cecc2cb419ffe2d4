"""The engine: one case, an operator in a form and a dtype, on CPU and on device jax."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree

from . import cases, compare, forms, mutation, samples
from .cases import Case
from .compare import Mismatch
from .samples import CaseTimeout, Inapplicable, Sample


@dataclasses.dataclass
class Result:
    """What became of a case."""

    case: Case
    status: str  # pass, fail, skip
    reason: str = ""
    samples: int = 0  # how many were compared
    failures: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """As an entry of a results file."""
        return {
            "op": self.case.op.name,
            "variant": self.case.op.variant_test_name,
            "aten": [name] if (name := getattr(self.case.op, "aten_name", None)) else [],
            "form": self.case.form,
            "dtype": cases.dtype_name(self.case.dtype),
            "status": self.status,
            "reason": self.reason,
            "samples": self.samples,
            "failures": self.failures,
            "seconds": round(self.seconds, 2),
        }


@contextlib.contextmanager
def _limit(seconds: float | None) -> Iterator[None]:
    """Raise `CaseTimeout` in the block after some seconds."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(*_: Any) -> None:
        raise CaseTimeout

    handler = signal.signal(signal.SIGALRM, expired)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        left = timer[0] - (time.monotonic() - started) if timer[0] else 0
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.01) if timer[0] else 0)


def run_case(case: Case, max_samples: int | None = None, timeout: float | None = None, turn: int = 0) -> Result:
    """Run a case on at most `max_samples` samples, evenly spread over all; another `turn` takes others."""
    started = time.monotonic()
    result = Result(case, "pass")
    skipped: list[str] = []
    try:
        with _limit(timeout), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i, sample in _samples(case, max_samples, turn):
                try:
                    run_sample(case, sample)
                    result.samples += 1
                except Inapplicable as error:
                    skipped.append(str(error))
                except CaseTimeout:
                    raise
                except Exception as error:
                    result.samples += 1
                    result.failures.append((i, describe(error)))
                with contextlib.suppress(Exception):
                    mutation.settle()  # what waits belongs to this sample
    except CaseTimeout:
        result.failures.append((-1, f"CaseTimeout: {timeout} s"))
    except Exception as error:  # the samples themselves cannot be had
        result.failures.append((-1, f"no samples: {describe(error)}"))
    if result.failures:
        result.status = "fail"
        result.reason = f"sample {result.failures[0][0]}: {result.failures[0][1]}"
        if len(result.failures) > 1:
            result.reason += f" (and {len(result.failures) - 1} more of {result.samples})"
    elif not result.samples and result.status == "pass":
        result.status, result.reason = "skip", skipped[0] if skipped else "no samples"
    result.seconds = time.monotonic() - started
    return result


def describe(error: Exception) -> str:
    """A short line for an exception."""
    if isinstance(error, Mismatch):
        return str(error).splitlines()[0][:300]
    cause = error.__cause__
    tail = f" <- {type(cause).__name__}: {mutation.brief(cause, 150)}" if cause is not None else ""
    return f"{type(error).__name__}: {mutation.brief(error, 200)}{tail}"


def _samples(case: Case, limit: int | None, turn: int) -> Iterator[tuple[int, Sample]]:
    if case.form == "errors":
        yield from enumerate(mutation.error_cases(case.op))
        return
    form = forms.VALUE_FORMS.get(case.form)
    requires_grad = form is not None and form.requires_grad
    assert case.dtype is not None
    yield from samples.chosen(samples.generate(case.op, case.dtype, requires_grad), limit, turn)


def run_sample(case: Case, sample: Sample) -> None:
    """Run one sample of a case; raises `Mismatch`, or what the device raised, if it is not as on CPU."""
    op, form = case.op, case.form
    torch.manual_seed(samples.SEED)
    for t in sample.tensors():
        samples.require_strided(t)
    if form == "errors":
        mutation.wrong_call(op, sample)
        return
    defined = not cases.is_random(op, sample, form) and op.full_name not in cases.UNINITIALISED
    values = defined and getattr(op, "values", True)
    tolerance = lambda dtype: compare.tolerance_of(op, dtype)

    def same(got: Any, want: Any, reference: Any = None, layout: bool = False) -> None:
        compare.compare(got, want, tolerance, values=values, layout=layout, reference=reference)

    if form == "inplace":
        mutation.inplace(op, sample, same)
    elif form == "out":
        mutation.out(op, sample, same, values)
    elif form == "view":
        mutation.view(op, sample, same)
    else:
        _run_values(op, forms.VALUE_FORMS[form], form, sample, same)


def _run_values(op: Any, form: forms.ValueForm, name: str, sample: Sample, same: Any) -> None:
    sample = form.prepare(sample)
    unique = lambda result, s: result
    if form.layout or name in ("jit", "conj_neg"):
        unique = lambda result, s: compare.invariant(op, result, s)
    elif name == "vmap" and op.full_name in compare.INVARIANTS:  # of the batch, the example that is the sample
        unique = lambda result, s: compare.invariant(op, pytree.tree_map(lambda t: t[0], result), s)
    here = samples.fresh(sample)
    want = mutation.attempt(lambda: form.cpu(op, here))
    if want.error is not None and name != "forward":
        raise Inapplicable(f"CPU torch: {mutation.brief(want.error)}")
    there = samples.to_jax(sample)
    if op.is_factory_function and not sample.tensors():
        there.kwargs.setdefault("device", "jax")  # else nothing says where
    got = mutation.attempt(lambda: (form.jax or form.cpu)(op, there))
    mutation.same_error(got.error, want.error)
    if want.error is not None:
        raise Inapplicable(f"CPU torch: {mutation.brief(want.error)}")

    def reference() -> Any:
        wide = samples.upcast(sample)
        return unique(form.cpu(op, wide), wide)

    wanted = unique(want.result, here)
    same(unique(got.result, there), wanted, reference, form.layout and wanted is want.result)
    if name == "forward":
        pairs = [mutation.shared(mutation.tensors_of(r), s) for r, s in ((got.result, there), (want.result, here))]
        if any(g is not None and w is None for g, w in zip(*pairs, strict=True)):  # the converse: form view
            raise Mismatch(f"results share memory with the inputs {pairs[0]}, on CPU {pairs[1]}")
