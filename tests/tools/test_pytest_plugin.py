"""``--torchax-platform`` and the marker, in a pytest of its own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = """
import sys
import pytest

def test_runs(torchax_platform):
    import torch, torchax
    assert torchax_platform == "cpu" and torch.ones(1, device="jax").jax().devices().pop().platform == "cpu"

@pytest.mark.torchax_platforms("tpu", "gpu")
def test_elsewhere():
    raise AssertionError

@pytest.mark.torchax_platforms("cpu")
def test_here():
    pass
"""


def run(folder: pathlib.Path, *arguments: str) -> tuple[int, str]:
    (folder / "test_it.py").write_text(TESTS)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST") and k != "JAX_PLATFORMS"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rs",
        "--strict-markers",
        "-p",
        "no:cacheprovider",
        *arguments,
        "test_it.py",
    ]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    return result.returncode, result.stdout + result.stderr


def test_platform_is_told_to_jax(tmp_path: pathlib.Path) -> None:
    code, said = run(tmp_path, "--torchax-platform", "cpu")
    assert code == 0 and "2 passed, 1 skipped" in said, said
    assert "torchax: platform cpu, plugins: aten 0.1.0 loaded" in said
    assert "needs platform tpu or gpu; this is cpu" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--torchax-platform", "tpu"), "--torchax-platform tpu: JAX cannot use it here"),
        (("--torchax-platform", "gpu"), "Where there is one, pip install 'torchax[cuda]'"),
        (("--torchax-platform", "npu"), "invalid choice: 'npu'"),
    ],
)
def test_platforms_that_are_not_there(tmp_path: pathlib.Path, arguments: tuple[str, ...], said: str) -> None:
    code, output = run(tmp_path, *arguments)
    assert code == 4 and said in output and "Traceback" not in output, output


def test_without_the_option_nothing_is_imported(tmp_path: pathlib.Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import sys\nassert not {'torch', 'jax', 'torchax'} & set(sys.modules)\n"
        "def pytest_sessionfinish(): assert not {'torch', 'jax', 'torchax'} & set(sys.modules)\n"
    )
    code, said = run(tmp_path, "-k", "test_nothing_of_this_name")
    assert code == 5, said
