"""`new-plugin`: a distribution with a plugin that works."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from ..output import epilog, fail

EXAMPLES = """\
Examples:
  torchax-ops new-plugin my-ops                  makes torchax-ops-my-ops in the current folder
  pip install -e './torchax-ops-my-ops[test]' && pytest torchax-ops-my-ops

Exit codes: 0; 2 if the name is bad or the folder exists. Nothing is written then."""


def new_plugin(
    name: Annotated[str, typer.Argument(help="the plugin's name; the distribution is torchax-ops-NAME")],
    into: Annotated[pathlib.Path | None, typer.Option(help="the folder to make; default: ./torchax-ops-NAME")] = None,
) -> None:
    """Make a distribution with a plugin that works: an operator of its own, an override, a report section, parity tests."""
    from .. import new_plugin as maker

    try:
        folder, files = maker.write(name, into)
    except maker.Refused as error:
        raise fail(str(error)) from None
    except OSError as error:
        raise fail(f"nothing was written: {error}") from None
    for file in files:
        print(folder / file)
    print(f"\nnext: pip install -e '{folder}[test]' && pytest {folder}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("new-plugin", epilog=epilog(EXAMPLES))(new_plugin)
