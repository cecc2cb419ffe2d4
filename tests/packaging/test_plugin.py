"""A third party's plugin: built as a wheel, installed into an environment, seen to work, uninstalled, seen to be gone."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import venv

import pytest
from torchax import plugins
from torchax_tools import new_plugin

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "plugin-torchax-ops-demo"
USE = """
import torch, torchax
from torchax.ops import REGISTRY, aten
from torchax_ops_demo.ops import rms_norm
x = torch.randn(2, 4, requires_grad=True)
y = x.detach().to("jax").requires_grad_()
for t in (x, y):
    rms_norm(t, torch.ones(4, device=t.device)).square().sum().backward()
torch.testing.assert_close(y.grad.cpu(), x.grad)
half = torch.linspace(-3, 3, 7).half()
gelu = torch.nn.functional.gelu
torch.testing.assert_close(gelu(half.to("jax"), approximate="tanh").cpu(), gelu(half, approximate="tanh"))
call = ((half,), {"approximate": "tanh"})
taken = REGISTRY.resolve(aten.gelu.default, "cpu", torch.float16, call=call)
assert taken.fn.__name__ == "gelu_tanh" and taken.provider == "demo", taken
assert REGISTRY.resolve(aten.gelu.default, "cpu", torch.float32, call=call).provider == "aten"
"""
GONE = """
import torch, torchax
from torchax.ops import REGISTRY, aten
assert REGISTRY.resolve(aten.gelu.default, "cpu", torch.float16).provider == "aten"
assert "torchax_ops_demo::rms_norm" not in REGISTRY
assert torch.nn.functional.gelu(torch.ones(1, device="jax").half(), approximate="tanh").shape == (1,)
"""


class Environment:
    """A virtual environment that sees what this one has installed, and more."""

    def __init__(self, folder: pathlib.Path):
        self.python = folder / "bin" / "python"
        venv.create(folder, with_pip=False)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    def pip(self, *arguments: object) -> None:
        call(sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments)

    def run(self, *arguments: object, cwd: pathlib.Path | None = None) -> str:
        return call(self.python, *arguments, cwd=cwd)

    def plugins(self) -> dict[str, str]:
        out = self.run("-m", "torchax_tools.cli", "plugins", "--format", "json")
        return {p["name"]: p["state"] for p in json.loads(out)}


def call(*command: object, cwd: pathlib.Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, (
        f"{command}: exit {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    )
    return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment") / "env")


def wheel(project: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_install_use_uninstall(environment: Environment, tmp_path: pathlib.Path) -> None:
    before = environment.plugins()
    assert "demo" not in before
    environment.pip("install", "-q", "--no-deps", "--no-index", wheel(EXAMPLE, tmp_path))
    assert environment.plugins() == {**before, "demo": "loaded"}
    environment.run("-c", USE)
    report = json.loads(environment.run("-m", "torchax_tools.cli", "coverage", "--plugin", "demo", "--format", "json"))
    assert "aten::gelu" in {row["op"] for row in report["ops"]}
    (section,) = [s for s in report["sections"] if s["title"] == "What demo serves"]
    assert {row["op"]: row["otherwise"] for row in section["rows"]} == {
        "aten::gelu": "aten",
        "torchax_ops_demo::rms_norm": "nobody",
    }
    environment.pip("uninstall", "-q", "-y", "torchax-ops-demo")
    assert environment.plugins() == before
    environment.run("-c", GONE)
    assert not list(environment.python.parents[1].rglob("*torchax_ops_demo*"))


def test_a_new_plugin_passes_its_own_tests(environment: Environment, tmp_path: pathlib.Path) -> None:
    environment.run("-m", "torchax_tools.cli", "new-plugin", "my-ops", cwd=tmp_path)
    project = tmp_path / "torchax-ops-my-ops"
    (tmp_path / "wheel").mkdir()
    environment.pip("install", "-q", "--no-deps", "--no-index", wheel(project, tmp_path / "wheel"))
    try:
        said = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--torchax-platform", "cpu", cwd=project)
        assert " passed" in said and "failed" not in said and "skipped" not in said, said
        wrong = project / "tests" / "test_wrong.py"  # and they would see a wrong lowering
        wrong.write_text(
            "from torchax_ops_my_ops import lowerings\n"
            "import torch, torchax_ops_my_ops.ops as ops\n"
            "from torchax.testing import assert_parity\n"
            "def test(): assert_parity(ops.rms_norm, [(torch.randn(3), torch.ones(3))], reference=lambda x, w: x)\n"
        )
        with pytest.raises(AssertionError, match="rms_norm differs from CPU"):
            environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", wrong, cwd=project)
    finally:
        environment.pip("uninstall", "-q", "-y", "torchax-ops-my-ops")


def test_the_example_is_what_the_command_makes() -> None:
    made = new_plugin.files("demo")
    for path, text in made.items():
        assert (EXAMPLE / path).read_text() == text, f"{path}: make it again with torchax-ops new-plugin demo"
    found = {str(p.relative_to(EXAMPLE)) for p in EXAMPLE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert found == set(made)
    assert new_plugin.API == plugins.API_VERSION


@pytest.mark.parametrize("name", ["", "9lives", "a b", "../x", "a--b", "aten", "torchax-ops-pallas"])
def test_names_that_cannot_be(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = name in ("aten", "torchax-ops-pallas")
    with pytest.raises(new_plugin.Refused, match="is installed already, by" if taken else "cannot be a plugin's name"):
        new_plugin.write(name)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path: pathlib.Path) -> None:
    with pytest.raises(new_plugin.Refused, match="exists; name another folder with --into"):
        new_plugin.write("demo", tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="disk full"):
        new_plugin.write("demo", tmp_path / "there" / "demo")
    assert not list((tmp_path / "there").iterdir())
