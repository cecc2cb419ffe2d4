"""`torchax-ops scan`: models out of modules and files, saved programs, and what is no program."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest
import torch

from commands import as_json, run

MODELS = """
import torch
def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30000, 100000), torch.nn.GELU(), torch.nn.LayerNorm(100000))
    return model, (torch.randn(2, 30000),)
def looks(): return lambda x: x if x.sum() > 0 else -x, torch.ones(2)
def foobar(): return torch.ops.aten._foobar, (torch.ones(2),)
def nothing(): return 3
def module(): return torch.nn.Linear(2, 2)
def fails(): raise ValueError("not today")
def exits(): raise SystemExit(3)
class Lazy:
    def __getattr__(self, name): raise RuntimeError("not here")
lazy = Lazy()
def prints():
    print("loading")
    return torch.relu, (torch.ones(2),)
number = 3
"""


def test_scan(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scanned_models.py").write_text(MODELS)
    (tmp_path / "scanned_empty.py").write_text("raise RuntimeError('at import')")
    report = as_json("scan", "scanned_models:make", "--backward")  # 12 GB, if it were computed
    rows = {row["op"]: row for row in report["ops"]}
    assert rows["aten::addmm"]["how"] == "lowered" and "aten::native_layer_norm_backward" in rows
    assert report["missing"] == []
    assert "aten::gt.Scalar" in run("scan", str(tmp_path / "scanned_models.py") + ":looks", "--real")
    said = run("scan", "scanned_models:foobar", code=1)
    assert "1 missing: aten::_foobar" in said
    for what, message in (
        ("scanned_models:looks", "scanned with --real"),
        ("scanned_models:nothing", "made int; expected (callable, arguments)"),
        ("scanned_models:module", "A module alone does not say"),
        ("scanned_models:fails", "ValueError: not today"),
        ("scanned_models:exits", "SystemExit"),
        ("scanned_models:number", "is a int, not callable"),
        ("scanned_models:lazy.make", "RuntimeError: not here"),
        ("scanned_models:absent", "no attribute 'absent'"),
        ("scanned_empty:make", "its import failed: RuntimeError: at import"),
        ("scanned_nowhere:make", "no module 'scanned_nowhere'"),
        ("scanned_nowhere.py:make", "no such file"),
        ("scanned_models.py", "is no program of torch.export"),
        ("nowhere.pt2", "no such file"),
    ):
        output = run("scan", what, code=2)
        assert message in output and "Traceback" not in output, output


def test_scan_of_a_file_that_is_called_as_another_module_and_prints(tmp_path: pathlib.Path) -> None:
    (tmp_path / "json.py").write_text(MODELS)
    report = json.loads(run("scan", f"{tmp_path / 'json.py'}:prints", "--format", "json"))
    assert [row["op"] for row in report["ops"]] == ["aten::relu"] and sys.modules["json"] is json


def test_scan_of_an_exported_program(tmp_path: pathlib.Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(2, 3),)), path)
    report = as_json("scan", str(path))
    assert {"aten::linear", "aten::relu"} <= {row["op"] for row in report["ops"]}
