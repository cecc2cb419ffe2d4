"""The benchmark program runs and reports; what it measures is nobody's business here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchax.interop import jax_view
from torchax_tools.bench import __main__ as bench
from torchax_tools.bench import families, measure, models, zoo


def test_ratio_and_failure() -> None:
    x = torch.ones(3, device="jax")
    row = measure.ratio(
        "g", "n", lambda: x + x, lambda: x * x, "x * x", 2.0, lambda: torch.ones(3), rounds=3, batch=1e-4
    )
    assert row.value and row.ours and row.theirs and row.torch_cpu and row.reached == (row.value <= 2.0)
    broken = measure.ratio("g", "broken", lambda: 1 // 0, lambda: 1, "", None)
    assert broken.value is None and broken.error.startswith("ZeroDivisionError")
    table = bench.report([row, broken])
    assert table.row_count == 2


def test_families_compute_the_same() -> None:
    for name, ours, theirs, values in families._cases():
        arrays = [jnp.asarray(v) for v in values]
        torch.testing.assert_close(
            torch.from_numpy(np.array(jax_view(ours)(*arrays))),
            torch.from_numpy(np.array(theirs(*arrays))),
            rtol=1e-3,
            atol=2e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_models_are_what_they_say() -> None:
    for name, make in models.MODELS.items():
        model, inputs = make()
        model.eval()
        with torch.no_grad():
            out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        assert (out if isinstance(out, torch.Tensor) else out[0]).isfinite().all(), name


@pytest.mark.parametrize("case", list(zoo.cases()), ids=lambda case: case.name)
def test_models_by_hand_compute_the_same(case: zoo.Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.inputs()
    with torch.no_grad():
        want = case.call(model, *inputs)
    got = jax.jit(case.by_hand)(zoo.arrays(model.named_parameters()), *zoo.as_jax_users(inputs))
    torch.testing.assert_close(torch.from_numpy(np.array(got)), want, rtol=1e-4, atol=1e-4)
