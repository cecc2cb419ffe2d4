"""`doctor` and `fallbacks`: whether the installation works, and what of a program runs on CPU."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from typing import Annotated

import typer

from ..output import FAILED, AsFormat, Format, epilog, write_json, write_table

DOCTOR_EXAMPLES = """\
Examples:
  torchax-ops doctor
  torchax-ops doctor --format json | jq '.[] | select(.state == "wrong")'

Exit codes: 0; 1 if something is wrong."""
FALLBACKS_EXAMPLES = """\
Examples:
  torchax-ops fallbacks train.py --steps 3

Exit code: 0, whatever fell back; what the program itself exits with is said on stderr."""


def doctor(format: AsFormat = Format.table) -> None:
    """Versions, devices, plugins, settings, common mistakes, and a small training step."""
    from ..doctor import examine

    checks = examine()
    if format is Format.json:
        write_json(checks)
    else:
        write_table("", checks, ["what", "state", "detail", *(["remedy"] if any(c["remedy"] for c in checks) else [])])
    if any(c["state"] == "wrong" for c in checks):
        raise typer.Exit(FAILED)


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
    printing = contextlib.redirect_stdout(sys.stderr) if format is Format.json else contextlib.nullcontext()
    with torchax.config.override(fallback="cpu"), warnings.catch_warnings(), printing:
        warnings.filterwarnings("ignore", message=".*has no lowering and runs on CPU.*")
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as leaving:
            if leaving.code not in (None, 0):
                print(f"{script} ended with exit code {leaving.code}", file=sys.stderr)
    rows = [{"op": op, "calls": n} for op, n in SERVED.most_common()]
    if format is Format.json:
        write_json(rows)
    else:
        write_table("Served by CPU torch", rows)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("doctor", epilog=epilog(DOCTOR_EXAMPLES))(doctor)
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command("fallbacks", context_settings=settings, epilog=epilog(FALLBACKS_EXAMPLES))(fallbacks)
