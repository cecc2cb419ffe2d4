"""Runs every program in examples/ as a user does."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).resolve().parents[2] / "examples").glob("*.py"))
ARGUMENTS = {"train_digits.py": ["--epochs", "12"]}
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # other tests run beside it


@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_example(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = subprocess.run(
        [sys.executable, str(file), *ARGUMENTS.get(file.name, [])],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    if file.name == "train_digits.py":
        assert (tmp_path / "out" / "train_digits.png").stat().st_size > 10_000
        assert "jax, compiled" in result.stdout
