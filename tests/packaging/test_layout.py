"""What the layout promises, read from the sources: one version, arrows that point one way, short modules, typed packages."""

from __future__ import annotations

import ast
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator

import pytest
import torchax

from helpers import run_python

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = {
    "torchax": ROOT / "packages/torchax-core/src/torchax",
    "torchax_ops_aten": ROOT / "packages/torchax-ops-aten/src/torchax_ops_aten",
    "torchax_ops_pallas": ROOT / "packages/torchax-ops-pallas/src/torchax_ops_pallas",
    "torchax_interop": ROOT / "packages/torchax-interop/src/torchax_interop",
    "torchax_tools": ROOT / "tools/torchax_tools",
}
MAY_IMPORT = {
    "torchax": set(),
    "torchax_ops_aten": {"torchax"},
    "torchax_ops_pallas": {"torchax"},
    "torchax_interop": {"torchax"},
    "torchax_tools": {"torchax", "torchax_interop"},
}
LAZY = {
    "torchax": {"torchax_interop"},
    "torchax_tools": {"torchax_ops_pallas"},
}  # only inside of functions, that is, on first use
PROJECTS = [ROOT / "pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]
MODULES = sorted(file for folder in SOURCES.values() for file in folder.rglob("*.py"))
IMPORTED_AS = {"ml_dtypes": "ml_dtypes", "orbax-checkpoint": "orbax", "typing-extensions": "typing_extensions"}


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def project(file: pathlib.Path) -> dict:
    return tomllib.loads(file.read_text())["project"]


def owner(file: pathlib.Path) -> str:
    return next(name for name, folder in SOURCES.items() if file.is_relative_to(folder))


def imports(file: pathlib.Path) -> Iterator[tuple[str, int, bool]]:
    """Top-level names that a module imports, with the line, and whether that happens on first use only."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name.split(".")[0], child.lineno, lazy
            elif isinstance(child, ast.ImportFrom):
                if child.level == 0 and child.module:
                    yield child.module.split(".")[0], child.lineno, lazy
            else:
                yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(file.read_text(), filename=str(file)), False)


def test_one_version() -> None:
    assert len(PROJECTS) == 5
    versions = {project(file)["name"]: project(file)["version"] for file in PROJECTS}
    assert len(set(versions.values())) == 1, versions
    version = versions["torchax"]
    assert torchax.__version__ == version
    for file in PROJECTS:
        p = project(file)
        extras = [r for extra in p.get("optional-dependencies", {}).values() for r in extra]
        for requirement in [*p["dependencies"], *extras]:
            if pin := re.match(r"(torchax[a-z-]*)==(.*)", requirement):
                assert pin[2] == version, f"{p['name']} asks for {requirement}"
            else:
                assert not re.match(r"torchax-", requirement), f"{p['name']} asks for {requirement} without =="


def test_metapackage() -> None:
    root = project(PROJECTS[0])
    names = {re.split(r"[=<>\[]", r)[0] for r in root["dependencies"]}
    assert {"torchax-core", "torchax-ops-aten", "torchax-interop"} <= names
    assert {"pallas", "tpu", "cuda", "all", "test"} <= set(root["optional-dependencies"])
    assert f"## {root['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("file", PROJECTS, ids=name_of)
def test_metadata(file: pathlib.Path) -> None:
    p = project(file)
    assert p["license"] == "Apache-2.0"
    assert (file.parent / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert p["requires-python"] == ">=3.11"
    assert (file.parent / p["readme"]).read_text().startswith(f"# {p['name']}\n")


def test_entry_points() -> None:
    found = {}
    for file in PROJECTS:
        found |= project(file).get("entry-points", {}).get("torchax.plugins", {})
    assert found == {"aten": "torchax_ops_aten:plugin", "pallas": "torchax_ops_pallas:plugin"}


@pytest.mark.parametrize("package", SOURCES)
def test_typed(package: str) -> None:
    assert (SOURCES[package] / "py.typed").exists()
    assert (SOURCES[package] / "__init__.py").exists()


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_module(file: pathlib.Path) -> None:
    """A module is read in one sitting, says what it is for, and imports nothing against the arrows."""
    text = file.read_text()
    assert len(text.splitlines()) <= 600, f"{name_of(file)} has {len(text.splitlines())} lines; split it"
    assert ast.get_docstring(ast.parse(text)), f"{name_of(file)} has no docstring"
    package = owner(file)
    allowed = {package} | MAY_IMPORT[package]
    for name, line, lazy in imports(file):
        if name in SOURCES and name not in allowed:
            late = name in LAZY.get(package, ())
            assert late, f"{name_of(file)}:{line} imports {name}, against the arrows"
            assert lazy, f"{name_of(file)}:{line} imports {name} at once; it may only be reached on first use"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_are_declared(file: pathlib.Path) -> None:
    """Whatever a module imports at once is among the dependencies of its distribution, or of torchax-core."""
    declared = set(SOURCES)
    home = ROOT if owner(file) == "torchax_tools" else file.parents[file.parts[::-1].index("src")]
    for toml in {home / "pyproject.toml", ROOT / "packages/torchax-core/pyproject.toml"}:
        requirements = list(project(toml)["dependencies"])
        if "testing" in file.parts or file.name == "pytest_plugin.py":
            requirements += project(toml)["optional-dependencies"]["testing"]
        requirements += project(toml).get("optional-dependencies", {}).get(file.stem, [])  # a module for one extra
        for requirement in requirements:
            name = re.split(r"[=<>\[ ]", requirement)[0]
            declared.add(IMPORTED_AS.get(name, name.replace("-", "_")))
    for name, line, lazy in imports(file):
        if not lazy and name not in sys.stdlib_module_names:
            assert name in declared, f"{name_of(file)}:{line} imports {name}, which its pyproject.toml does not ask for"


def test_import_loads_interop_on_first_use() -> None:
    run_python(
        "import sys, torchax\n"
        "assert 'torchax_interop' not in sys.modules, 'import torchax loads torchax_interop'\n"
        "torchax.interop.jax_view\n"
        "assert 'torchax_interop' in sys.modules\n"
    )
