"""The `torchax-ops` command inside of the test process."""

from __future__ import annotations

import json
from typing import Any

from torchax_tools import cli
from typer.testing import CliRunner


def run(*arguments: str, code: int = 0) -> str:
    """What it says, on stdout alone if all is well; it ends with `code`."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.stdout if not code else result.output


def as_json(*arguments: str) -> Any:
    """Its results with ``--format json``."""
    return json.loads(run(*arguments, "--format", "json"))
