"""`scan`: the operators of a model, and who serves them, before it is run."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from ..output import FAILED, PLATFORMS, AsFormat, Format, among, epilog, fail, require, write_json, write_table

EXAMPLES = """\
Examples:
  torchax-ops scan my_package.models:make       make() returns (model, arguments)
  torchax-ops scan train.py:step --backward     with the operators of the gradients
  torchax-ops scan exported.pt2                 a program that torch.export.save wrote

The factory takes no arguments and returns (callable, arguments), (callable, arguments, keywords), a model of
transformers, or a function without arguments. It runs on tensors without values; --real computes on CPU.

Exit codes: 0; 1 if an operator is missing; 2 if there is nothing to scan."""


def scan(
    program: Annotated[str, typer.Argument(help="MODULE:FACTORY, FILE.py:FACTORY or a saved torch.export program")],
    platform: Annotated[
        str | None, typer.Option(help="cpu, gpu or tpu; default: JAX's own", autocompletion=among(PLATFORMS))
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="also the operators of the gradients")] = False,
    real: Annotated[bool, typer.Option("--real", help="compute on CPU; for programs that look at values")] = False,
    format: AsFormat = Format.table,
) -> None:
    """Which operators a model uses, what is missing, and who serves what, before running it."""
    import jax
    import torchax  # noqa: F401  loads the plugins

    from .. import scan as scanner

    require("platform", platform, PLATFORMS)
    path = pathlib.Path(program)
    try:
        if ":" not in program or path.is_file():
            if not path.is_file():
                raise scanner.BadProgram(f"{program}: no such file; a model is named MODULE:FACTORY")
            if backward or real:
                raise scanner.BadProgram("--backward and --real are for MODULE:FACTORY; a saved program is what it is")
            calls = scanner.record_export(path)
        else:
            calls = scanner.record_factory(program, backward, real)
    except scanner.BadProgram as error:
        raise fail(str(error)) from None
    found = scanner.rows(calls, platform or jax.default_backend())
    missing = [row["op"] for row in found if row["how"] == "missing"]
    if format is Format.json:
        write_json({"program": program, "missing": missing, "ops": found})
    else:
        columns = ["op", "calls", "how", "provider", "family"]
        if any(row["conditions"] for row in found):
            columns.append("conditions")
        write_table(f"{len(found)} operators, {sum(row['calls'] for row in found)} calls", found, columns)
    if missing:
        typer.echo(f"{len(missing)} missing: {', '.join(missing)}", err=True)
        raise typer.Exit(FAILED)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("scan", epilog=epilog(EXAMPLES))(scan)
