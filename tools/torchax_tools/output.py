"""How the command writes: tables for people, JSON, CSV and Markdown for programs, errors on stderr."""

from __future__ import annotations

import csv
import enum
import io
import json
import os
import pathlib
import sys
import tempfile
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

OK, FAILED, USAGE = 0, 1, 2  # exit codes: done; a check did not hold; wrong arguments or input


class Format(enum.StrEnum):
    """How results are written."""

    table = "table"
    json = "json"


AsFormat = Annotated[Format, typer.Option("--format", help="table or json")]


def console() -> Console:
    """A console on stdout; wide, without colours, where stdout is a pipe or file."""
    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = 160
    return made


def write_json(value: Any) -> None:
    """`value` on stdout."""
    print(json.dumps(value, indent=1))


def write_table(title: str, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
    """Rows of the same keys as a table on stdout; columns of numbers are flush right."""
    out = console()
    if title:
        out.print(title, style="bold", markup=False)
    if not rows:
        out.print("  none")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    columns = columns or list(rows[0])
    for column in columns:
        numbers = all(
            isinstance(row.get(column), int | float) and not isinstance(row.get(column), bool) for row in rows
        )
        table.add_column(column.replace("_", " "), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_styled(column, plain(row.get(column))) for column in columns))
    out.print(table)


_STYLES = {
    "missing": "red", "quarantined": "red", "wrong": "red", "fail": "red", "worse": "red",
    "disabled": "yellow", "note": "yellow", "lowered": "green", "loaded": "green", "ok": "green", "better": "green",
}  # fmt: skip


def _styled(column: str, text: str) -> str:
    style = _STYLES.get(text) if column in ("how", "state", "change") else None
    return f"[{style}]{escape(text)}[/{style}]" if style else escape(text)


def plain(value: Any) -> str:
    """A value in a cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(x) for x in value)
    return "" if value is None else str(value)


def as_csv(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as CSV with a heading."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([plain(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def as_markdown(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a Markdown table."""
    cell = lambda value: plain(value).replace("|", "\\|").replace("\n", " ")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_text(text: str, path: pathlib.Path | None) -> None:
    """`text` on stdout or, whole or not at all, into a file."""
    if path is None:
        sys.stdout.write(text)
        return
    try:
        save(text, path)
    except OSError as error:
        raise fail(f"{path} cannot be written: {error.strerror or error}") from None
    print(f"written: {path}", file=sys.stderr)


def save(text: str, path: pathlib.Path) -> None:
    """Write a file, whole or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def epilog(text: str) -> str:
    """The end of a help text, its lines as they are."""
    return "\n\n".join("\b\n" + paragraph for paragraph in text.split("\n\n"))


def fail(message: str) -> typer.Exit:
    """Say on stderr what is wrong with the arguments or the input; raise what it returns: the command exits with 2."""
    print(message, file=sys.stderr)
    return typer.Exit(USAGE)
