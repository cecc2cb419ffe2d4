"""The command line for triage: chosen operators, forms and dtypes of OpInfo on CPU and on device jax.

python tests/opinfo/run.py --ops 'linalg.*' --forms forward,grad --dtypes float32 --samples 3 --json out.json
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys

if __package__ in (None, ""):  # started as a script
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    import jax_environment

    jax_environment.prepare()

import jax
import torch
from torchax.testing import cases
from torchax.testing.engine import Result, run_case

from opinfo import known


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
        args.json.write_text(
            json.dumps([{**r.record(), "known": known.reason(r.case) or ""} for r in results], indent=0)
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
