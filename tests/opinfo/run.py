"""The engine: one case on CPU and on device jax, and the command line for triage.

python tests/opinfo/run.py --ops 'linalg.*' --forms forward,grad --dtypes float32 --samples 3 --json out.json
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

if __package__ in (None, ""):  # started as a script
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    import jax_environment

    jax_environment.prepare()

import jax
import torch
import torch.utils._pytree as pytree
import torchax  # noqa: F401  (makes the device)

from opinfo import cases, compare, forms, known, mutation, samples
from opinfo.cases import Case
from opinfo.compare import Mismatch
from opinfo.samples import CaseTimeout, Inapplicable, Sample


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
    if not seconds:
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
    values = not cases.is_random(op, sample, form) and op.full_name not in cases.UNINITIALISED
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


# Command line -----------------------------------------------------------------------------------------------------


def summary(results: list[Result]) -> str:
    """Totals per form and dtype."""
    lines = []
    for title, key in (("form", lambda r: r.case.form), ("dtype", lambda r: cases.dtype_name(r.case.dtype))):
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for r in results:
            counts[key(r)][r.status] += 1
        lines.append(f"{title:14}{'pass':>8}{'fail':>8}{'skip':>8}")
        for name, count in counts.items():
            lines.append(f"{name:14}{count['pass']:8}{count['fail']:8}{count['skip']:8}")
    return "\n".join(lines)


def main() -> int:
    """Run the cases that the command line asks for; 1 if any fails that is not known to."""
    parser = argparse.ArgumentParser(description="OpInfo cases on device jax against CPU torch.")
    parser.add_argument("--ops", help="regular expression over full names (name or name.variant)")
    parser.add_argument("--forms", default="forward", help=f"of {','.join(cases.FORMS)}, or all")
    parser.add_argument("--dtypes", help="names with commas; all that an operator has if left out")
    parser.add_argument("--samples", type=int, default=3, help="of each case; 0 for all")
    parser.add_argument("--json", type=pathlib.Path, help="where the results are written")
    parser.add_argument("--timeout-per-case", type=float, default=60)
    parser.add_argument("--verbose", action="store_true", help="a line for every failing sample, and for skips")
    args = parser.parse_args()
    chosen = cases.FORMS if args.forms == "all" else args.forms.split(",")
    if unknown := set(chosen) - set(cases.FORMS):
        parser.error(f"no such form: {', '.join(sorted(unknown))}")
    dtypes = [getattr(torch, d) for d in args.dtypes.split(",")] if args.dtypes else None
    results: list[Result] = []
    failed = 0
    lines = args.json.with_suffix(".jsonl").open("w") if args.json else None
    for n, op in enumerate(cases.matching(args.ops)):
        for case in cases.enumerate_cases(forms=chosen, dtypes=dtypes, among=[op]):
            result = run_case(case, args.samples or None, args.timeout_per_case)
            results.append(result)
            if lines:
                print(json.dumps(result.record()), file=lines, flush=True)
            expected = known.reason(case)
            failed += (result.status == "fail") is (expected is None) and result.status != "skip"
            if (result.status == "fail" and not expected) or (args.verbose and result.status != "pass"):
                mark = "KNOWN" if expected else result.status.upper()
                shown = result.failures if args.verbose and result.failures else [(None, result.reason)]
                for _, text in shown:
                    print(f"{mark} {case.name}: {text}", flush=True)
        if n % 40 == 39:
            jax.clear_caches()  # thousands of loaded programs are gigabytes
    print(summary(results))
    if args.json:
        args.json.write_text(json.dumps([r.record() for r in results], indent=0))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
