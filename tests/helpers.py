"""Comparisons that tests of all kinds share."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import torch
import torch.utils._pytree as pytree

ROOT = pathlib.Path(__file__).resolve().parents[1]


def examples(n: int) -> hypothesis.settings:
    """Settings of a property whose examples take long: `n` of them in the ci profile, in others in proportion."""
    profiles = [
        hypothesis.settings.get_profile(name) for name in ("ci", hypothesis.settings.get_current_profile_name())
    ]
    return hypothesis.settings(max_examples=n * profiles[1].max_examples // profiles[0].max_examples)


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], torch.Tensor]:
    """A step as users write it: a mean of squares, its gradients, the optimizer; gives the loss."""

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def assert_same(
    got: Any, want: Any, *, rtol: float | None = None, atol: float | None = None, layout: bool = False
) -> None:
    """`got`, computed on device jax, equals `want`, computed by torch on CPU: structure, shapes, dtypes and values.

    Args:
        got: a tensor or any container that torch's pytree knows.
        want: the same on CPU.
        rtol: relative tolerance; torch.testing's default for the dtype if None.
        atol: absolute tolerance; given together with `rtol`.
        layout: compare strides and storage offsets as well.
    """
    got_leaves, got_spec = pytree.tree_flatten(got)
    want_leaves, want_spec = pytree.tree_flatten(want)
    assert got_spec == want_spec, f"structures differ: {got_spec} and {want_spec}"
    for g, w in zip(got_leaves, want_leaves, strict=True):
        if not isinstance(w, torch.Tensor):
            assert g == w, f"{g!r} is not {w!r}"
            continue
        assert isinstance(g, torch.Tensor), f"{type(g)} where torch gives a tensor"
        assert g.device.type == "jax", f"the result is on {g.device}"
        assert g.dtype == w.dtype and g.shape == w.shape, f"{g.dtype} {g.shape}, torch: {w.dtype} {w.shape}"
        if layout:
            assert g.stride() == w.stride() and g.storage_offset() == w.storage_offset()
        torch.testing.assert_close(g.detach().cpu(), w.detach(), rtol=rtol, atol=atol, equal_nan=True)


def run_python(code: str, *arguments: str, timeout: float = 240, **environment: str) -> str:
    """Run `code` in a fresh interpreter; its standard output. Fails with its standard error if it fails."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout
