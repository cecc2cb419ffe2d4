"""`coverage`: which operators there are, how each is served, and what tests say of it."""

from __future__ import annotations

import dataclasses
import enum
import pathlib
from typing import Annotated, Any

import typer

from ..output import (
    DTYPES,
    FAILED,
    PLATFORMS,
    among,
    as_csv,
    as_markdown,
    epilog,
    fail,
    require,
    torch_dtype,
    write_table,
    write_text,
)
from .listing import families_that_begin, plugins_that_begin

EXAMPLES = """\
Examples:
  torchax-ops coverage                                   totals, by kind and plugin
  torchax-ops coverage --missing --core                  what of core ATen does not run
  torchax-ops coverage --family norm --platform tpu      one family, as a TPU serves it
  torchax-ops coverage --format html --output ops.html   one file, to search and filter in a browser
  torchax-ops coverage --fail-under 90 --diff before.json

Exit codes: 0; 1 if fewer than --fail-under percent run, or --diff finds an operator that got worse; 2 for wrong
arguments or files."""


class Format(enum.StrEnum):
    """How the report is written."""

    table = "table"
    json = "json"
    csv = "csv"
    markdown = "markdown"
    html = "html"


def coverage(
    plugin: Annotated[
        str | None, typer.Option(help="only what this plugin lowers", autocompletion=plugins_that_begin)
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="only this family: pointwise, norm, ...", autocompletion=families_that_begin)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="as a call with this dtype is served; its parity", autocompletion=among(DTYPES))
    ] = None,
    platform: Annotated[
        str | None,
        typer.Option(help="as cpu, gpu or tpu is served; default: all lowerings", autocompletion=among(PLATFORMS)),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="only this kind: lowered, derived, missing, ...")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="only what does not run; as --kind missing")] = False,
    core: Annotated[bool, typer.Option("--core", help="only the core ATen set")] = False,
    results: Annotated[
        pathlib.Path | None, typer.Option(help="results of the tests; default: .cache/opinfo-results.json hereabouts")
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="table, json, csv, markdown or html")] = Format.table,
    output: Annotated[pathlib.Path | None, typer.Option("--output", "-o", help="a file; default: stdout")] = None,
    fail_under: Annotated[
        float | None, typer.Option(min=0, max=100, help="exit with 1 if fewer percent of the chosen ops run")
    ] = None,
    diff: Annotated[pathlib.Path | None, typer.Option(help="an earlier report (json) to compare with")] = None,
) -> None:
    """Which operators run, and in which way: by plugin, family, platform and dtype, with the results of tests."""
    from .. import coverage as data
    from .. import diff as differences
    from .. import parity

    if missing and kind not in (None, "missing"):
        raise fail(f"--missing and --kind {kind} exclude each other")
    kind = "missing" if missing else kind
    require("kind", kind, data.KINDS)
    require("platform", platform, PLATFORMS)
    if output is not None and format is Format.table:
        raise fail("a table is for reading here: give --output with --format json, csv, markdown or html")
    wanted = torch_dtype(dtype)
    try:
        path = results if results is not None else parity.default_path()
        known = parity.read(path) if path is not None else None
        before = differences.read(diff) if diff is not None else None
    except (parity.BrokenResults, differences.BrokenReport) as error:
        raise fail(str(error)) from None
    everything = data.coverage(known, platform, wanted)
    if dtype:
        everything = [
            dataclasses.replace(
                row,
                parity={f: {d: s for d, s in by.items() if d == dtype} for f, by in row.parity.items() if dtype in by},
            )
            for row in everything
        ]
    require("family", family, sorted({row.family for row in everything}))
    chosen = [
        row
        for row in everything
        if plugin in (None, row.provider, *(a["plugin"] for a in row.alternatives))
        and family in (None, row.family)
        and (not core or (row.core_aten and row.set == "aten"))
    ]
    if plugin is not None and not chosen:
        _no_such_plugin(plugin)
    listed = [row for row in chosen if kind in (None, row.kind)]
    filtered = any(x is not None for x in (plugin, family, kind)) or core
    report = _report(chosen, listed, path.name if path is not None else "", platform, dtype)
    changes = None
    if before is not None:
        changes = _changes(before, listed, {row.op for row in everything}, filtered)
    if changes is None or format in (Format.json, Format.html):
        if changes is not None:
            report["changes"] = changes
        _write(report, format, output, filtered)
    else:
        _write_changes(changes, format, output)
    share = data.summary(chosen)["core_aten" if core else "aten"] if not plugin else _share(chosen)
    if fail_under is not None and 100 * share["share"] < fail_under:
        typer.echo(
            f"{share['runs']} of {share['ops']} run, {share['share']:.2%}: fewer than {fail_under:g} %", err=True
        )
        raise typer.Exit(FAILED)
    if changes and any(change["change"] == "worse" for change in changes):
        typer.echo("some operators got worse", err=True)
        raise typer.Exit(FAILED)


def _share(rows: list[Any]) -> dict[str, Any]:
    runs = sum(row.kind != "missing" for row in rows)
    return {"ops": len(rows), "runs": runs, "share": runs / len(rows) if rows else 0.0}


def _no_such_plugin(name: str) -> None:
    from torchax import plugins

    states = {s.name: s.state for s in plugins.status()}
    require("plugin", name, states)
    if states[name] != "loaded":
        raise fail(f"plugin {name!r} is {states[name]}; torchax-ops plugins says why")


def sections() -> list[dict[str, Any]]:
    """What plugins add to the report; a section that cannot be had says so."""
    from torchax import plugins
    from torchax._registry import REGISTRY

    found = []
    for made in plugins.hook.torchax_report_section.get_hookimpls():
        takes = {"registry": REGISTRY} if "registry" in made.argnames else {}
        try:
            section: Any = made.function(**takes)
            if section:
                found.append({"title": str(section["title"]), "rows": [dict(row) for row in section["rows"]]})
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            found.append({"title": f"the section of plugin {made.plugin_name!r} failed", "rows": [{"error": said}]})
    return found


def _report(
    chosen: list[Any], listed: list[Any], results: str, platform: str | None, dtype: str | None
) -> dict[str, Any]:
    import jax
    import torch
    import torchax

    from .. import coverage as data

    environment = {"torchax": torchax.__version__, "torch": torch.__version__, "jax": jax.__version__}
    environment |= {k: v for k, v in (("platform", platform), ("dtype", dtype), ("results", results)) if v}
    return {
        "torchax": torchax.__version__,
        "environment": environment,
        "kinds": data.KINDS,
        "sets": data.SETS,
        "summary": data.summary(chosen),
        "sections": sections(),
        "ops": [{**dataclasses.asdict(row), "set": row.set} for row in listed],
    }


COLUMNS = (
    "op",
    "how",
    "by",
    "provider",
    "version",
    "platforms",
    "family",
    "core",
    "conditions",
    "pass",
    "known",
    "fail",
)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """An operator of the report without nests, for tables."""
    from ..parity import counts

    return {
        "op": row["op"],
        "how": row["kind"],
        "by": row["by"],
        "provider": row["provider"],
        "version": row["version"],
        "platforms": row["platforms"],
        "family": row["family"],
        "core": row["core_aten"],
        "conditions": "; ".join(f"{a['plugin']} ({a['priority']}): {a['condition']}" for a in row["alternatives"]),
        **{k: n or None for k, n in counts(row["parity"]).items() if k != "skip"},
    }


def _write(report: dict[str, Any], format: Format, output: pathlib.Path | None, filtered: bool) -> None:
    if format is Format.json:
        import json

        write_text(json.dumps(report, indent=1) + "\n", output)
    elif format is Format.html:
        from .. import html

        write_text(html.page(report), output)
    elif format is Format.csv:
        write_text(as_csv([flat(row) for row in report["ops"]], list(COLUMNS)), output)
    elif format is Format.markdown:
        rows = [flat(row) for row in report["ops"]]
        totals = as_markdown(_totals(report), list(_totals(report)[0]))
        write_text(totals + "\n" + as_markdown(rows, list(COLUMNS)), output)
    else:
        _write_tables(report, filtered)


def _totals(report: dict[str, Any]) -> list[dict[str, Any]]:
    sets = report["summary"]
    rows = [
        {"kind": kind, **{report["sets"][s]: sets[s][kind] for s in sets}, "meaning": meaning}
        for kind, meaning in report["kinds"].items()
    ]
    rows.append({"kind": "all", **{report["sets"][s]: sets[s]["ops"] for s in sets}, "meaning": ""})
    said = ", ".join(f"{sets[s]['share']:.1%} of {report['sets'][s]}" for s in sets if sets[s]["ops"])
    rows[-1]["meaning"] = f"{said} run" if said else ""
    return rows


def _write_tables(report: dict[str, Any], filtered: bool) -> None:
    write_table("", _totals(report))
    by_provider: dict[str, dict[str, Any]] = {}
    for row in report["ops"]:
        if row["kind"] == "lowered":
            line = by_provider.setdefault(
                row["provider"], {"plugin": row["provider"], "version": row["version"], "ops": 0}
            )
            line["ops"] += 1
    write_table("Lowered by", [by_provider[name] for name in sorted(by_provider)])
    for section in report["sections"]:
        write_table(section["title"], section["rows"])
    rows = [flat(row) for row in report["ops"]]
    if filtered:
        shown = [c for c in COLUMNS if c in ("op", "how") or any(row[c] for row in rows)]
        for family in sorted({row["family"] for row in rows}):
            write_table(
                family, [{c: row[c] for c in shown if c != "family"} for row in rows if row["family"] == family]
            )
    else:
        write_table("By family", _families(rows))


def _families(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    table = []
    for family in sorted({row["family"] for row in rows}):
        these = [row for row in rows if row["family"] == family]
        cases = {k: sum(row[k] or 0 for row in these) for k in ("pass", "known", "fail")}
        missing = sum(row["how"] == "missing" for row in these)
        table.append({"family": family, "ops": len(these), "missing": missing, **cases})
    return table


def _changes(before: dict[str, Any], listed: list[Any], there: set[str], filtered: bool) -> list[dict[str, str]]:
    from .. import diff as differences

    now = {row.op: dataclasses.asdict(row) for row in listed}
    if filtered:  # what the filter leaves out has not gone
        before = {op: row for op, row in before.items() if op in now or op not in there}
    return differences.compare(before, now)


def _write_changes(changes: list[dict[str, str]], format: Format, output: pathlib.Path | None) -> None:
    columns = ["op", "change", "before", "after"]
    if format is Format.csv:
        write_text(as_csv(changes, columns), output)
    elif format is Format.markdown:
        write_text(as_markdown(changes, columns), output)
    else:
        write_table(f"{len(changes)} operators differ", changes)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("coverage", epilog=epilog(EXAMPLES))(coverage)
