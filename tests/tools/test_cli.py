"""The `torchax-ops` command, as a user calls it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchax
from torchax import plugins
from torchax.ops import REGISTRY, Lowering
from torchax_tools import cli, coverage, doctor, index, mistakes, output
from typer.testing import CliRunner

from commands import as_json, run
from helpers import run_python


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def test_help_has_examples_and_exit_codes() -> None:
    for command in ("coverage", "list", "plugins", "explain", "scan", "fit", "doctor", "fallbacks", "new-plugin"):
        said = run(command, "--help")
        assert "Exit code" in said or command == "list", command
        assert f"torchax-ops {command}" in said or command == "plugins", command
    assert "--install-completion" in run("--help") and "Exit codes" in run("--help")


# list -------------------------------------------------------------------------------------------------------------


def test_list() -> None:
    rows = as_json("list", "aten::add.Tensor")
    assert [r["op"] for r in rows] == ["aten::add.Tensor"] and rows[0]["plugin"] == "aten"
    assert "aten::add.Tensor" in run("list", "add")
    assert as_json("list", "--plugin", "pallas", "nothing of this name") == []


def test_list_is_kept_until_something_changes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = index.rows()
    (kept,) = index.folder().iterdir()
    monkeypatch.setattr(index, "_load", lambda: pytest.fail("loaded the plugins again"))
    assert index.rows() == full and len(full) > 500
    kept.write_text("{broken")
    monkeypatch.setattr(index, "_load", lambda: ["made again"])
    assert index.rows() == ["made again"] and index.rows() == ["made again"]
    monkeypatch.setenv("TORCHAX_PLUGINS", "-pallas")
    before = index.fingerprint()
    (tmp_path / "new_plugin.py").write_text("")
    info = tmp_path / "new_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: new-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchax.plugins]\nnew = new_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with_plugin = index.fingerprint()
    (tmp_path / "new_plugin.py").write_text("x = 1")
    assert len({before, with_plugin, index.fingerprint()}) == 3


def test_light_commands_do_not_import_torch() -> None:
    run_python(
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from torchax_tools import cli, index\n"
        "for command in (['--help'], ['coverage', '--help'], ['list']):\n"
        "    index._load = lambda: [{'op': 'a', 'kind': 'b', 'plugin': 'c', 'family': 'd', 'priority': 0, 'condition': ''}]\n"
        "    result = CliRunner().invoke(cli.app, command)\n"
        "    assert result.exit_code == 0, result.output\n"
        "assert not {'torch', 'jax', 'torchax', 'numpy'} & set(sys.modules)\n"
    )


def test_works_when_piped(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "torchax_tools.cli", "list"]
    piped = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert piped.returncode == 0 and "\x1b" not in piped.stdout and not piped.stderr
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode in (0, -signal.SIGPIPE) and not errors, errors


def test_tables_are_lines_in_pipes_and_paragraphs_on_narrow_terminals(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"op": "x" * 200, "state": "wrong", "n": 3}, {"op": "a\nb", "state": "", "n": 10}]
    output.write_table("All", rows)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "All" and lines[4] == f"  {'x' * 200}  wrong   3" and lines[5] == f"  {'a b':80}         10"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for width, said in (
        (300, f"  {'x' * 200}  \x1b[31mwrong\x1b[0m   3\n"),
        (40, f"  {'x' * 25}  \x1b[31mwrong\x1b[0m"),
        (24, "\n\x1b[1mop: \x1b[0ma b\n\x1b[1mn: \x1b[0m10\n"),
    ):
        monkeypatch.setenv("COLUMNS", str(width))
        output.write_table("", rows)
        written = capfd.readouterr().out
        assert said in written, f"{width}:\n{written!r}"


def test_a_list_of_everything_takes_little_time() -> None:
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    rows = [{"op": f"aten::op{i}", "kind": "functional", "priority": i, "condition": "always"} for i in range(500)]
    sys.setprofile(count)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            output.write_table("", rows)
    finally:
        sys.setprofile(None)
    assert calls < 100 * len(rows), calls  # rich's tables: 1,900 for each


def test_completion() -> None:
    def complete(*words: str) -> list[str]:
        typed = {
            "_TORCHAX_OPS_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        code = "import sys; sys.argv = ['torchax-ops']; from torchax_tools.cli import main; main()"
        result = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **typed}, capture_output=True, text=True, timeout=120
        )
        return result.stdout.split()

    made = {"plugin": "aten", "priority": 0, "condition": "", "kind": ""}
    index.folder().mkdir(parents=True)
    output.save(
        json.dumps(
            [{"op": "aten::softplus", "family": "activation", **made}, {"op": "my::soft", "family": "own", **made}]
        ),
        index.folder() / f"lowerings-{index.fingerprint()}.json",
    )
    assert complete("torchax-ops", "expl") == ["explain"]
    assert complete("torchax-ops", "explain", "soft") == ["softplus"]
    assert complete("torchax-ops", "explain", "aten::s") == ["aten::softplus"]
    assert complete("torchax-ops", "coverage", "--family", "a") == ["activation"]
    assert complete("torchax-ops", "scan", "--platform", "") == ["cpu", "gpu", "tpu"]
    assert complete("torchax-ops", "explain", "--dtype", "bf") == ["bfloat16"]


def test_plugins_keeps_what_list_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    run("plugins")
    monkeypatch.setattr(index, "_load", lambda: pytest.fail("loaded the plugins again"))
    assert "aten::softplus " in run("list", "softplus")


# explain ----------------------------------------------------------------------------------------------------------


def test_explain_names_provider_and_reason() -> None:
    (answer,) = as_json("explain", "aten::mm")[:1]
    assert answer["kind"] == "lowered" and answer["provider"] == "aten"
    assert answer["candidates"][-1]["function"].startswith("torchax_ops_aten.")
    assert any(c["taken"] and c["reason"] for c in answer["candidates"])
    (inplace,) = as_json("explain", "add_.Tensor")
    assert inplace["op"] == "aten::add_.Tensor" and inplace["kind"] == "derived"
    assert [s["op"] for s in inplace["steps"]][-1] == "aten::add.Tensor" and inplace["served"].startswith("aten: ")
    assert as_json("explain", "torch.ops.aten.add_.Tensor") == [inplace]
    assert "lowered, by aten" in run("explain", "add.Tensor", "--dtype", "bfloat16", "--platform", "tpu")
    assert as_json("explain", "layer_norm")[0]["served"] or as_json("explain", "layer_norm")[0]["kind"] == "composite"


@pytest.fixture
def matrices():
    """A plugin that serves sinc of float16 matrices, and one that ties with it on TPU."""

    def is_matrix(x: Any) -> bool:
        return len(x.shape) == 2

    def plugin(*entries: Lowering) -> Any:
        class Plugin:
            @plugins.hookimpl
            def torchax_register_ops(self, registry: Any) -> None:
                for entry in entries:
                    registry.add(entry)

            @plugins.hookimpl
            def torchax_report_section(self, registry: Any) -> dict[str, Any]:
                return {"title": "Matrices", "rows": [{"op": e.op} for e in entries]}

        return Plugin()

    sinc = "aten::sinc"
    made = {
        "matrices": plugin(Lowering(op=sinc, fn=lambda x: x, when=is_matrix, dtypes=(torch.float16,), priority=5)),
        "rival": plugin(Lowering(op=sinc, fn=lambda x: x, platforms=("tpu",), priority=5)),
    }
    for name, each in made.items():
        plugins.register(each, name)
    yield
    for name in made:
        plugins.disable(name)
        plugins._found.pop(name)
        plugins._objects.pop(name)


def test_explain_asks_conditions_of_the_call_at_hand(matrices: None) -> None:
    def served(*more: str) -> str:
        (answer,) = as_json("explain", "aten::sinc.default", *more)[:1]
        return answer["served"].split(":")[0]

    assert served("--dtype", "float16", "--shape", "2x3") == "matrices"
    assert served("--dtype", "float16", "--shape", "3") == served("--dtype", "float32", "--shape", "2x3") == "aten"
    said = run("explain", "sinc", "--dtype", "float16")
    assert "not asked, no shapes are given (--shape)" in said
    said = run("explain", "sinc", "--dtype", "float32", "--shape", "3")
    assert "does not serve dtype float32" in said and "serves platform tpu, not cpu" in said
    said = run("explain", "sinc", "--dtype", "float16", "--platform", "tpu", "--shape", "2x3")
    assert "tie with plugin 'matrices'" in said and "an error: aten::sinc is lowered by plugins" in said
    assert "predicate is_matrix says no" in run("explain", "sinc", "--dtype", "float16", "--shape", "scalar")


def test_explain_completes_calls() -> None:
    said = run("explain", "scaled_dot_product_attention", "--platform", "tpu", "--dtype", "bfloat16",
               *["--shape", "1x2x512x128"] * 3, "--arg", "is_causal=True")  # fmt: skip
    assert "taken" in said and "not asked" not in said
    assert "give a shape for key" in run("explain", "scaled_dot_product_attention", "--shape", "1x2x512x128")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("explain", "sofmax"), "did you mean aten::softmax"),
        (("explain", "add.Tensr"), "did you mean aten::add.Tensor"),
        (("explain", "torch.nn.functional.relu"), "did you mean aten::relu"),
        (("explain", "mm", "--dtype", "quint8", "--shape", "2x2"), "torch.quint8 has no counterpart in JAX"),
        (("explain", "nothing::softmax"), "no op 'nothing::softmax'"),
        (("explain", "mm", "--dtype", "float33"), "no dtype 'float33'"),
        (("explain", "mm", "--platform", "npu"), "no platform 'npu'; there are cpu, gpu, tpu"),
        (("explain", "mm", "--shape", "2y"), "'2y' is no shape"),
        (("explain", "mm", *["--shape", "2x2"] * 9), "too many"),
        (("explain", "mm", "--arg", "speed=9"), "no argument speed; it has self, mat2"),
        (("explain", "mm", "--arg", "speed"), "name=value"),
        (("coverage", "--kind", "x"), "no kind 'x'; there are lowered"),
        (("coverage", "--missing", "--kind", "lowered"), "exclude each other"),
        (("coverage", "--plugin", "nobody"), "no plugin 'nobody'; there are aten"),
        (("coverage", "--family", "nothing"), "no family 'nothing'; there are activation"),
        (("coverage", "--platform", "npu"), "no platform 'npu'"),
        (("coverage", "--dtype", "float33"), "no dtype 'float33'"),
        (("coverage", "--family", "nrom"), "no family 'nrom'; did you mean norm"),
        (("coverage", "--dtype", "bfloat61"), "no dtype 'bfloat61'; did you mean bfloat16"),
        (("coverage", "--diff", "nowhere.json", "--output", "x.txt"), "--format json, csv, markdown or html"),
        (("coverage", "--results", "nowhere.json"), "nowhere.json: No such file"),
        (("coverage", "--diff", "nowhere.json"), "nowhere.json: No such file"),
        (("coverage", "--output", "x.txt"), "--format json, csv, markdown or html"),
        (("list", "--family", "nothing"), "no family 'nothing'"),
        (("list", "--plugin", "nobody"), "no plugin 'nobody'"),
        (("new-plugin", "9"), "cannot be a plugin's name"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    said_by_both = run(*arguments, code=2) + capfd.readouterr().err
    assert "Traceback" not in said_by_both and said in said_by_both


# plugins, doctor, fallbacks ---------------------------------------------------------------------------------------


def test_plugins_and_doctor() -> None:
    rows = {row["name"]: row for row in as_json("plugins")}
    assert rows["aten"]["state"] == "loaded" and rows["aten"]["ops"] > 300
    checks = {c["what"]: c for c in as_json("doctor")}
    assert checks["an eager training step"]["state"] == "ok" and checks["a compiled training step"]["state"] == "ok"
    assert {"torch", "jax", "libtpu", "devices"} <= checks.keys()
    assert "plugin aten" in run("doctor")


def test_doctor_looks_at_parameters_without_calling(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        @plugins.hookimpl
        def torchax_register_ops(self, registry):
            registry.add(Lowering(op="aten::sinc", fn=functools.partial(lambda: None), priority=-1))

    monkeypatch.setattr(doctor, "_training_step", lambda compiled: doctor.line("step", "ok", ""))
    plugins.register(Plugin(), "unfit")
    try:
        checks = json.loads(run("doctor", "--format", "json", code=1))
    finally:
        plugins.disable("unfit")
        plugins._found.pop("unfit")
        plugins._objects.pop("unfit")
    (wrong,) = [c for c in checks if c["what"] == "plugin unfit" and c["state"] == "wrong"]
    assert wrong["detail"].startswith("aten::sinc: the lowering ") and f"{__file__}:" in wrong["detail"]


def test_doctor_reports_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torchax-core": "0.1.0", "torchax": "0.2.0", "torchax-interop": None, "torchax-ops-aten": "0.1.0"}
    monkeypatch.setattr(doctor, "_version", {"torch": "2.9.1", "jax": "0.10.2", "jaxlib": "0.10.2", **versions}.get)
    monkeypatch.setenv("TORCHAX_PLUGINS", "-palas,aten")
    monkeypatch.setattr(doctor, "_training_step", lambda compiled: doctor.line("step", "ok", ""))
    status = plugins._found["wrecked"] = plugins.PluginStatus(
        "wrecked", "quarantined", "it raised ValueError: no", "w 1.0"
    )
    assert status.state == "quarantined"
    try:
        checks = json.loads(run("doctor", "--format", "json", code=1))
    finally:
        plugins._found.pop("wrecked")
    found = {c["what"]: c for c in checks}
    assert found["torchax"]["state"] == "wrong" and "0.2.0" in found["torchax"]["detail"]
    assert found["torchax-interop"]["remedy"] == "pip install torchax-interop"
    assert found["torchax-ops-pallas"]["state"] == "note"
    assert found["torch"]["remedy"].startswith("pip install 'torch<2.14") or ">=2.13" in found["torch"]["remedy"]
    assert (
        found["plugin wrecked"]["state"] == "wrong" and "TORCHAX_PLUGINS=-wrecked" in found["plugin wrecked"]["remedy"]
    )
    said = [c for c in checks if c["what"] == "TORCHAX_PLUGINS" and c["state"] == "wrong"]
    assert "'palas'" in said[0]["detail"] and "aten" in said[0]["remedy"] and "'aten' is ignored" in said[1]["detail"]


def test_versions_within_ranges() -> None:
    assert {"torch", "jax", "pluggy"} <= mistakes.ranges("torchax-core").keys()
    assert "hypothesis" not in mistakes.ranges("torchax-core")
    for version, inside in (("2.13.0+cpu", True), ("2.13.1", True), ("2.14.0", False), ("2.9", False), ("3", False)):
        assert mistakes.within(version, ">=2.13,<2.14") is inside


def test_fallbacks(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, torch, torchax\n"
        "assert sys.argv[1:] == ['--n', '2'] and torchax.config.fallback == 'cpu'\n"
        "x = torch.rand(3, device='jax')\n"
        "print((x + x).sum().item())\n"
    )
    out = run("fallbacks", "--format", "json", str(script), "--n", "2")
    assert json.loads(out) == []


def test_doctor_sees_ties(monkeypatch: pytest.MonkeyPatch, matrices: None) -> None:
    monkeypatch.setattr(doctor, "_training_step", lambda compiled: doctor.line("step", "ok", ""))
    assert "aten::sinc" not in run("doctor"), "matrices and its rival tie where a predicate says so alone"
    entries = [Lowering(op="aten::sinc", fn=abs, priority=7, provider=name, **more)
               for name, more in (("one", {"platforms": ("cpu", "tpu")}), ("two", {"platforms": ("tpu",)}))]  # fmt: skip
    for entry in entries:
        REGISTRY.add(entry)
    try:
        (tie,) = [c for c in json.loads(run("doctor", "--format", "json", code=1)) if c["what"] == "aten::sinc"]
        assert tie["state"] == "wrong" and "plugins one and two lower it with the same priority 7" in tie["detail"]
    finally:
        REGISTRY.remove("one")
        REGISTRY.remove("two")


def test_a_predicate_that_raises_ends_the_explanation() -> None:
    REGISTRY.add(Lowering(op="aten::sinc", fn=abs, priority=9, provider="clumsy", when=lambda x: x.nothing))
    try:
        (answer,) = as_json("explain", "sinc", "--shape", "2")[:1]
    finally:
        REGISTRY.remove("clumsy")
    assert answer["served"] == "" and answer["steps"][-1]["step"] == "resolution"
    assert "of plugin 'clumsy' raised AttributeError" in answer["steps"][-1]["result"]


def test_a_section_that_fails_names_its_plugin_and_leaves_the_others(matrices: None) -> None:
    class Broken:
        @plugins.hookimpl
        def torchax_report_section(self):
            return {"title": "no rows"}

    plugins.register(Broken(), "unready")
    try:
        found = {s["title"]: s["rows"] for s in as_json("coverage", "--family", "fft")["sections"]}
    finally:
        plugins.disable("unready")
        plugins._found.pop("unready")
        plugins._objects.pop("unready")
    assert found["the section of plugin 'unready' failed"] == [{"error": "KeyError: 'rows'"}] and "Matrices" in found


# coverage ---------------------------------------------------------------------------------------------------------

RECORDS = [
    {"op": "sinc", "form": "forward", "dtype": "float16", "status": "pass"},
    {"op": "sinc", "form": "inplace", "dtype": "float32", "status": "fail", "known": "a reason"},
    {"op": "sinc", "form": "out", "dtype": "float32", "status": "fail"},
    {"op": "nn.functional.softplus", "form": "grad", "dtype": "float32", "status": "pass"},
    {"op": "linalg.qr", "form": "forward", "dtype": "float64", "status": "pass"},
    {"op": "fantasy", "aten": ["mm"], "form": "forward", "dtype": "int64", "status": "skip"},
]


@pytest.fixture
def results(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RECORDS))
    return str(path)


def test_coverage_counts_every_operator(results: str) -> None:
    report = as_json("coverage", "--results", results)
    for part in ("aten", "core_aten", "prims"):
        counts = report["summary"][part]
        assert counts["ops"] == sum(counts[kind] for kind in coverage.KINDS) and counts["runs"] > 0.5 * counts["ops"]
    rows = {row["op"]: row for row in report["ops"]}
    assert sum(row["set"] == "aten" for row in rows.values()) == report["summary"]["aten"]["ops"] > 2000
    assert rows["aten::mm"]["kind"] == "lowered" and rows["aten::mm"]["version"] == torchax.__version__
    assert rows["aten::mm.out"]["kind"] == "derived" and rows["aten::mm.out"]["by"] == "aten::mm"
    assert rows["aten::_foreach_add.List"]["family"] == "foreach"
    assert rows["aten::sinc"]["parity"] == {
        "forward": {"float16": "pass"}, "inplace": {"float32": "known"}, "out": {"float32": "fail"},
    }  # fmt: skip
    assert rows["aten::sinc_"]["parity"] == {"inplace": {"float32": "known"}}
    assert rows["aten::sinc.out"]["parity"] == {"out": {"float32": "fail"}}
    assert rows["aten::softplus_backward"]["parity"] == {"grad": {"float32": "pass"}}
    assert rows["aten::linalg_qr"]["parity"] == {"forward": {"float64": "pass"}}
    assert rows["aten::mm"]["parity"] == {"forward": {"int64": "skip"}}


def test_coverage_filters(results: str, matrices: None) -> None:
    missing = as_json("coverage", "--missing", "--core")["ops"]
    assert all(row["kind"] == "missing" and row["core_aten"] for row in missing)
    assert {row["family"] for row in as_json("coverage", "--family", "fft")["ops"]} == {"fft"}
    (sinc,) = as_json("coverage", "--plugin", "matrices", "--platform", "cpu", "--dtype", "float16")["ops"][:1]
    assert sinc["op"] == "aten::sinc" and [a["plugin"] for a in sinc["alternatives"]] == ["matrices", "aten"]
    assert sinc["alternatives"][0]["condition"] == "dtype in float16, is_matrix" and sinc["family"] != "test_cli"
    rows = {r["op"]: r for r in as_json("coverage", "--dtype", "float32", "--results", results)["ops"]}
    assert rows["aten::sinc"]["provider"] == "rival" and set(rows["aten::sinc"]["parity"]) == {"inplace", "out"}
    said = run("coverage", "--plugin", "matrices")
    assert "Matrices" in said and "matrices (5): dtype in float16, is_matrix" in said
    assert "% of core ATen" in run("coverage")


def test_coverage_formats(results: str, tmp_path: pathlib.Path) -> None:
    csv = run("coverage", "--family", "fft", "--format", "csv", "--results", results).splitlines()
    assert csv[0].startswith("op,how,by,provider") and any(line.startswith("aten::fft_fft,") for line in csv)
    markdown = run("coverage", "--family", "fft", "--format", "markdown")
    assert "| kind | ATen |" in markdown and "| aten::fft_fft |" in markdown
    file = tmp_path / "report.json"
    assert run("coverage", "--format", "json", "--output", str(file)) == ""
    assert json.loads(file.read_text())["summary"]["aten"]
    assert "cannot be written" in run("coverage", "--format", "json", "-o", str(tmp_path / "no" / "x.json"), code=2)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_what_is_no_file_is_written_to_and_links_lead_on(tmp_path: pathlib.Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        output.save("text", pipe)
        assert reader.communicate(timeout=20)[0] == "text" and pipe.is_fifo()
    file.write_text("before")
    file.chmod(0o600)
    link.symlink_to(file)
    output.save("after", link)
    assert link.is_symlink() and file.read_text() == "after" and file.stat().st_mode & 0o777 == 0o600


def test_fail_under() -> None:
    assert "fewer than 100 %" in run("coverage", "--fail-under", "100", code=1)
    run("coverage", "--fail-under", "50")
    run("coverage", "--core", "--fail-under", "99")


def test_diff(results: str, tmp_path: pathlib.Path) -> None:
    old = tmp_path / "old.json"
    run("coverage", "--format", "json", "-o", str(old), "--results", results)
    assert run("coverage", "--diff", str(old), "--results", results).startswith("0 operators differ")
    report = json.loads(old.read_text())
    rows = {row["op"]: row for row in report["ops"]}
    rows["aten::mm"]["kind"], rows["aten::mm"]["provider"] = "missing", ""
    report["ops"] = [row for row in report["ops"] if row["op"] != "aten::bmm"]
    old.write_text(json.dumps(report))
    changes = as_json("coverage", "--diff", str(old), "--results", results)["changes"]
    assert [(c["op"], c["change"]) for c in changes] == [("aten::bmm", "new"), ("aten::mm", "better")]
    rows["aten::_foobar"]["kind"] = "lowered"
    rows["aten::sinc.out"]["parity"] = {"out": {"float32": "pass"}}
    old.write_text(json.dumps(report))
    said = run("coverage", "--diff", str(old), "--results", results, code=1)
    assert "got worse" in said and "aten::_foobar" in said and "aten::sinc.out" in said
    assert run("coverage", "--diff", str(old), "--family", "fft", "--results", results).startswith("0 operators differ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "is no results file"),
        ('[{"op": "mm"}]', "dtype, form, op, status"),
        ('[{"op": 1, "form": "forward", "dtype": "int64", "status": "pass"}]', "is no results file"),
        ('[{"op": "mm", "form": "forward", "dtype": [], "status": "pass"}]', "is no results file"),
        ('[{"op": "mm", "aten": 3, "form": "forward", "dtype": "int64", "status": "pass"}]', "is no results file"),
        ('[{"op": "mm", "form": "forward", "dtype": "int64", "status": "maybe"}]', "unknown statuses maybe"),
    ],
)
def test_broken_results(text: str, said: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    output = run("coverage", "--results", str(path), code=2) + capfd.readouterr().err
    assert said in output and "Traceback" not in output
    output = run("coverage", "--diff", str(path), code=2) + capfd.readouterr().err
    assert "is no report" in output


@pytest.mark.parametrize("row", [{"parity": [1]}, {"op": 3}, {"kind": None}, {"parity": {"forward": "pass"}}])
def test_a_report_of_another_shape(
    row: dict[str, Any], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"ops": [{"op": "aten::mm", "kind": "lowered", **row}]}))
    assert "is no report" in run("coverage", "--diff", str(path), code=2) + capfd.readouterr().err


# tune -------------------------------------------------------------------------------------------------------------


def test_tune_says_that_there_is_no_tpu_and_what_is_wrong():
    for arguments, words in (
        (("attention", "8192", "8192", "128"), "timing kernels on a TPU"),
        (("attention", "8192"), "positive sizes length, keys, features"),
        (("atention", "1", "1", "1"), "there are attention"),
        (("attention", "64", "64", "64", "--dtype", "int8"), "bfloat16 or float32"),
    ):
        result = CliRunner().invoke(cli.app, ["tune", *arguments])
        assert result.exit_code == 2 and words in result.output + result.stderr, result.output
