"""Builds the five wheels and does with them what a user does: installs, uses, extends and uninstalls them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECTS = [
    ROOT / "packages" / n for n in ("torchax-core", "torchax-ops-aten", "torchax-ops-pallas", "torchax-interop")
]
PROJECTS.append(ROOT)
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NAMES = ["torchax", "torchax-core", "torchax-ops-aten", "torchax-ops-pallas", "torchax-interop"]
TORCH = "torch==2.13.0"

USE = """
import torch, torchax
x = torch.randn(3, 4, device="jax", requires_grad=True)
(x @ x.T).relu().sum().backward()
assert type(x.grad) is torchax.tensor.Tensor and x.grad.shape == (3, 4)
f = torchax.compile(lambda a: (a * 2).sum())
assert f(torch.ones(3, device="jax")).item() == 6
"""
WITHOUT_INTEROP = """
import torchax, torch
assert (torch.ones(2, device="jax") + 1).tolist() == [2, 2]
try:
    torchax.compile
except ImportError as error:
    assert "pip install torchax-interop" in str(error), error
else:
    raise SystemExit("torchax.compile is there without torchax-interop")
"""


def call(*command: object, cwd: pathlib.Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, (
        f"{command}: exit {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    )
    return result.stdout


def build(folder: pathlib.Path) -> None:
    """All five wheels into `folder`; each holds its package, its type marker and the license, and nothing else."""
    for project in PROJECTS:
        call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project, cwd=folder)
    wheels = sorted(folder.glob("*.whl"))
    assert [w.name.split("-")[:2] for w in wheels] == [[n.replace("-", "_"), VERSION] for n in sorted(NAMES)]
    for wheel in wheels:
        name = wheel.name.split("-")[0]
        package = {"torchax": "torchax_tools", "torchax_core": "torchax"}.get(name, name)
        files = zipfile.ZipFile(wheel).namelist()
        assert {f.split("/")[0] for f in files} == {package, f"{name}-{VERSION}.dist-info"}
        assert f"{package}/py.typed" in files
        assert any(f.endswith("licenses/LICENSE") for f in files)
        assert not any("__pycache__" in f for f in files)


@pytest.mark.packaging
@pytest.mark.timeout(900)
def test_install_use_uninstall(tmp_path: pathlib.Path) -> None:
    wheels, place, empty = tmp_path / "wheels", tmp_path / "env", tmp_path / "empty"
    wheels.mkdir()
    empty.mkdir()
    build(wheels)

    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    install = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile")
    install = (*install, "--find-links", wheels)

    def plugins() -> dict[str, str]:
        out = call(place / "bin" / "torchax-ops", "plugins", "--format", "json", cwd=empty)
        return {p["name"]: p["state"] for p in json.loads(out)}

    call(*install, TORCH, f"torchax=={VERSION}", cwd=empty)
    call(python, "-c", USE, cwd=empty)
    assert plugins() == {"aten": "loaded"}

    call(*install, f"torchax[pallas]=={VERSION}", cwd=empty)
    assert plugins() == {"aten": "loaded", "pallas": "loaded"}
    call(place / "bin" / "torchax-ops", "doctor", cwd=empty)
    call(python, "-m", "pip", "check", cwd=empty)

    call(python, "-m", "pip", "uninstall", "-q", "-y", "torchax-interop", cwd=empty)
    call(python, "-c", WITHOUT_INTEROP, cwd=empty)
    call(python, "-m", "pip", "uninstall", "-q", "-y", *[n for n in NAMES if n != "torchax-interop"], cwd=empty)
    left = [str(p.relative_to(place)) for p in place.rglob("*torchax*")]
    assert not left, f"left behind: {left}"
    assert not list(empty.iterdir()), "using torchax wrote into the current folder"
