"""The `torchax-ops` command, as a user calls it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from torchax_tools import cli, coverage, doctor
from typer.testing import CliRunner


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.stdout if not code else result.output


def as_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--format", "json"))


def test_list() -> None:
    rows = as_json("list", "aten::add.Tensor")
    assert [r["op"] for r in rows] == ["aten::add.Tensor"] and rows[0]["plugin"] == "aten"
    assert "aten::add.Tensor" in run("list", "add")
    assert as_json("list", "--plugin", "nobody") == []


def test_explain_names_provider_and_reason() -> None:
    (answer,) = as_json("explain", "aten::mm")[:1]
    assert answer["kind"] == "lowered" and answer["provider"] == "aten"
    assert answer["candidates"][-1]["function"].startswith("torchax_ops_aten.")
    assert any(c["taken"] and c["reason"] for c in answer["candidates"])
    assert [a["op"] for a in as_json("explain", "add_.Tensor")] == ["aten::add_.Tensor"]
    assert as_json("explain", "torch.ops.aten.add_.Tensor")[0]["kind"] == "derived"
    assert "lowered, by aten" in run("explain", "add.Tensor", "--dtype", "bfloat16", "--platform", "tpu")


@pytest.mark.parametrize(
    "arguments", [("explain", "sofmax"), ("explain", "mm", "--dtype", "float33"), ("coverage", "--kind", "x")]
)
def test_bad_arguments(arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    said = run(*arguments, code=2) + capfd.readouterr().err
    assert "Traceback" not in said
    assert {"sofmax": "did you mean", "mm": "no dtype", "--kind": "missing"}[arguments[1]] in said


def test_coverage() -> None:
    report = as_json("coverage")
    for part in ("aten", "core_aten"):
        counts = report["summary"][part]
        assert counts["ops"] == sum(counts[kind] for kind in coverage.KINDS) and counts["runs"] > 0.5 * counts["ops"]
    assert report["summary"]["aten"]["ops"] == len(report["ops"]) > 2000
    kinds = {row["op"]: row["kind"] for row in report["ops"]}
    assert kinds["aten::mm"] == "lowered" and kinds["aten::mm.out"] == "derived"
    missing = as_json("coverage", "--kind", "missing", "--core")["ops"]
    assert all(row["kind"] == "missing" and row["core_aten"] for row in missing)
    assert "core ATen run" in run("coverage")


def test_plugins_and_doctor() -> None:
    rows = {row["name"]: row for row in as_json("plugins")}
    assert rows["aten"]["state"] == "loaded" and rows["aten"]["ops"] > 300
    checks = {c["what"]: c for c in as_json("doctor")}
    assert checks["an eager training step"]["state"] == "ok" and checks["a compiled training step"]["state"] == "ok"
    assert "plugin aten" in run("doctor")


def test_doctor_reports_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torchax-core": "0.1.0", "torchax": "0.2.0", "torchax-interop": None, "torchax-ops-aten": "0.1.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    checks = {c["what"]: c for c in json.loads(run("doctor", "--format", "json", code=1))}
    assert checks["torchax"]["state"] == "wrong" and "0.2.0" in checks["torchax"]["detail"]
    assert checks["torchax-interop"]["detail"].endswith("pip install torchax-interop")
    assert checks["torchax-ops-pallas"]["state"] == "note"


def test_fallbacks(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, torch, torchax\n"
        "assert sys.argv[1:] == ['--n', '2'] and torchax.config.fallback == 'cpu'\n"
        "x = torch.rand(3, device='jax')\n"
        "(x + x).sum().item()\n"
    )
    out = run("fallbacks", "--format", "json", str(script), "--n", "2")
    assert json.loads(out) == []
