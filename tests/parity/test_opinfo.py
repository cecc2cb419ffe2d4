"""Every operator of PyTorch's own specification against CPU torch, form by form, dtype by dtype.

The ci profile runs a sample of the cases that never changes, with every operator in it; the thorough profile runs all.
`tests/opinfo/run.py` runs chosen ones from the command line.
"""

import os
import zlib

import jax
import pytest
import torch
from torchax.testing import cases, samples
from torchax.testing.engine import run_case

from opinfo import known

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
SAMPLES = None if THOROUGH else 1

_done = 0


def rank(case):
    """A number that looks random and is always the same."""
    return zlib.crc32(case.name.encode())


def chosen(op):
    """The cases of an operator that the profile runs: in ci two dtypes forward, two other forms, and all errors."""
    everything = list(cases.enumerate_cases(among=[op]))
    if THOROUGH:
        return everything
    forward = sorted((c for c in everything if c.form == "forward"), key=rank)[:2]
    others = {}
    for case in sorted((c for c in everything if c.form not in ("forward", "errors")), key=rank):
        others.setdefault(case.form, case)
    return forward + list(others.values())[:2] + [c for c in everything if c.form == "errors"]


def run(case):
    """The samples of a case that the profile runs."""
    return run_case(case, SAMPLES, timeout=600 if THOROUGH else 60, turn=0 if THOROUGH else rank(case))


def verdict(case, result):
    """What is wrong with a result, given what is known; None if nothing is."""
    expected = known.reason(case)
    if expected is None:
        return f"{case.name}: {result.reason}" if result.status == "fail" else None
    if result.status == "pass" and SAMPLES is not None:
        result = run_case(case)  # the samples that fail may be others
    return f"{case.name} passes: it is listed as known to differ ({expected})" if result.status == "pass" else None


@pytest.mark.timeout(7200 if THOROUGH else 300)
@pytest.mark.parametrize("op", cases.ops(), ids=lambda op: op.full_name)
def test_op(op, record_property):
    global _done
    records, wrong = [], []
    for case in chosen(op):
        result = run(case)
        records.append({**result.record(), "known": known.reason(case) or ""})
        problem = verdict(case, result)
        if problem:
            wrong.append(problem)
    record_property("opinfo", records)
    _done += 1
    if _done % 50 == 0:
        jax.clear_caches()  # thousands of loaded programs are gigabytes
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["addmm", "stft"])
def test_samples_are_those_that_opinfo_gives(name):
    (op,) = cases.matching(name)
    want = [samples.of(s) for s in op.sample_inputs("cpu", torch.float32)]
    got = samples.generate(op, torch.float32)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert len(g.args) == len(w.args) and g.kwargs.keys() == w.kwargs.keys()
        for a, b in zip(g.tensors(), w.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_known_difference_names_a_case():
    everything = list(cases.enumerate_cases())
    for entry in known.KNOWN:
        assert any(entry in known.entries(c) for c in everything), f"{entry} matches no case"
