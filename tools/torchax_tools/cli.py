"""The `torchax-ops` command: which operators there are, who carries them out and why, and whether the installation works."""

from __future__ import annotations

import dataclasses
import enum
import json
import pathlib
import sys
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False
)


class Format(enum.StrEnum):
    """How results are written."""

    table = "table"
    json = "json"


AsFormat = Annotated[Format, typer.Option("--format", help="table or json")]


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def _write_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _table(title: str, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
    console = _console()
    if title:
        console.print(title, style="bold", markup=False)
    if not rows:
        console.print("  none")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    columns = columns or list(rows[0])
    for column in columns:
        numbers = all(
            isinstance(row.get(column), int | float) and not isinstance(row.get(column), bool) for row in rows
        )
        table.add_column(column.replace("_", " "), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value).replace("[", r"\[")


def _fail(message: str) -> typer.Exit:
    print(message, file=sys.stderr)
    return typer.Exit(2)


@app.command()
def coverage(
    format: AsFormat = Format.table,
    kind: Annotated[str | None, typer.Option(help="list the ops of this kind, e.g. missing")] = None,
    core: Annotated[bool, typer.Option("--core", help="list and count only the core ATen set")] = False,
) -> None:
    """How much of ATen runs, and in which way."""
    import torchax
    from torchax import plugins

    from .coverage import KINDS, summary
    from .coverage import coverage as all_rows

    if kind is not None and kind not in KINDS:
        raise _fail(f"no kind {kind!r}; there are {', '.join(KINDS)}")
    rows = all_rows()
    counts = summary(rows)
    if core:
        rows = [row for row in rows if row.core_aten]
    sections = _sections(plugins)
    if format is Format.json:
        listed = [dataclasses.asdict(row) for row in rows if kind in (None, row.kind)]
        _write_json({"torchax": torchax.__version__, "summary": counts, "sections": sections, "ops": listed})
        return
    shares = [
        {"kind": name, "ATen": counts["aten"][name], "core ATen": counts["core_aten"][name], "meaning": meaning}
        for name, meaning in KINDS.items()
    ]
    total = {"kind": "all", "ATen": counts["aten"]["ops"], "core ATen": counts["core_aten"]["ops"]}
    part = {k: f"{counts[k]['share']:.1%}" for k in ("aten", "core_aten")}
    _table("", [*shares, {**total, "meaning": f"{part['aten']} of ATen and {part['core_aten']} of core ATen run"}])
    providers: dict[str, int] = {}
    for row in rows:
        if row.kind == "lowered":
            providers[row.provider] = providers.get(row.provider, 0) + 1
    _table("Lowered by", [{"plugin": name, "ops": n} for name, n in sorted(providers.items())])
    for section in sections:
        _table(section["title"], section["rows"])
    if kind is not None:
        _table(f"{kind}: {KINDS[kind]}", [dataclasses.asdict(row) for row in rows if row.kind == kind])


def _sections(plugins: Any) -> list[dict[str, Any]]:
    from torchax._registry import REGISTRY

    return [s for s in plugins.hook.torchax_report_section(registry=REGISTRY) if s]


@app.command("list")
def list_ops(
    pattern: Annotated[str, typer.Argument(help="part of the op's name")] = "",
    plugin: Annotated[str | None, typer.Option(help="only lowerings of this plugin")] = None,
    family: Annotated[str | None, typer.Option(help="only this family: pointwise, norm, ...")] = None,
    format: AsFormat = Format.table,
) -> None:
    """Every lowering: op, kind, plugin, family, priority and condition."""
    import torchax  # noqa: F401  loads the plugins
    from torchax._registry import REGISTRY

    rows = [
        {
            "op": e.op,
            "kind": "whole" if e.whole else e.kind,
            "plugin": e.provider,
            "family": e.family,
            "priority": e.priority,
            "condition": e.conditions,
        }
        for op in REGISTRY.ops()
        for e in REGISTRY.lowerings(op)
        if pattern in e.op and plugin in (None, e.provider) and family in (None, e.family)
    ]
    if format is Format.json:
        _write_json(rows)
    else:
        _table(f"{len(rows)} lowerings", rows)


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="add, add.Tensor, aten::add.Tensor or torch.ops.aten.add.Tensor")],
    platform: Annotated[str | None, typer.Option(help="cpu, gpu or tpu; default: JAX's own")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of the first tensor, e.g. bfloat16")] = None,
    format: AsFormat = Format.table,
) -> None:
    """Who carries an op out, and why: each candidate with the reason it is taken or passed over."""
    import difflib

    import jax
    import torch
    import torchax  # noqa: F401  loads the plugins
    from torchax._registry import REGISTRY

    from .coverage import KINDS, aten_ops, classify, find

    found = find(op)
    if not found:
        names = sorted({func.name().removeprefix("aten::").split(".")[0] for func in aten_ops()})
        near = difflib.get_close_matches(op.split("::")[-1].split(".")[0], names, 3)
        raise _fail(f"torch has no op {op!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    wanted = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(wanted, torch.dtype):
        raise _fail(f"torch has no dtype {dtype!r}")
    platform = platform or jax.default_backend()
    answers = []
    for func in found:
        how = classify(func)
        candidates = [
            {
                "plugin": v.lowering.provider,
                "function": f"{getattr(v.lowering.fn, '__module__', '?')}.{getattr(v.lowering.fn, '__qualname__', '?')}",
                "priority": v.lowering.priority,
                "condition": v.lowering.conditions,
                "taken": v.taken,
                "reason": v.reason,
            }
            for v in REGISTRY.explain(func, platform, wanted)
        ]
        answers.append(
            {**dataclasses.asdict(how), "schema": str(func._schema), "platform": platform, "candidates": candidates}
        )
    if format is Format.json:
        _write_json(answers)
        return
    console = _console()
    for answer in answers:
        console.print(answer["schema"], style="bold", markup=False)
        where = f", by {answer['provider']}" if answer["provider"] else ""
        console.print(f"  {answer['kind']}{where}: {KINDS[answer['kind']]}", markup=False)
        if answer["candidates"]:
            _table("", answer["candidates"])


@app.command()
def plugins(format: AsFormat = Format.table) -> None:
    """Every plugin that was found, and what became of it."""
    from torchax import plugins as manager

    rows = _plugin_rows(manager)
    if format is Format.json:
        _write_json(rows)
    else:
        _table("", rows)


def _plugin_rows(manager: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": s.name,
            "state": s.state,
            "distribution": s.distribution,
            "api": s.info.get("api", ""),
            "ops": s.ops,
            "summary": s.info.get("summary", ""),
            "reason": s.reason,
        }
        for s in manager.status()
    ]


@app.command()
def doctor(format: AsFormat = Format.table) -> None:
    """Versions, devices, plugins, settings, and a small training step. Exits with 1 if something is wrong."""
    from .doctor import examine

    checks = examine()
    if format is Format.json:
        _write_json(checks)
    else:
        _table("", checks)
    if any(c["state"] == "wrong" for c in checks):
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def fallbacks(
    context: typer.Context,
    script: Annotated[
        pathlib.Path, typer.Argument(help="a Python program; what follows are its arguments", exists=True)
    ],
    format: AsFormat = Format.table,
) -> None:
    """Run a program with the CPU fallback allowed; then list the ops that CPU torch served, and how often."""
    import runpy
    import warnings

    import torchax
    from torchax._missing import SERVED

    sys.argv = [str(script), *context.args]
    sys.path.insert(0, str(script.resolve().parent))
    with torchax.config.override(fallback="cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no lowering and runs on CPU.*")
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as leaving:
            if leaving.code not in (None, 0):
                print(f"{script} ended with exit code {leaving.code}", file=sys.stderr)
    rows = [{"op": op, "calls": n} for op, n in SERVED.most_common()]
    if format is Format.json:
        _write_json(rows)
    else:
        _table("Served by CPU torch", rows)


def main() -> None:
    """The entry point of the command."""
    app()


if __name__ == "__main__":
    main()
