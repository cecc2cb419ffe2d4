"""How the command writes: tables for people, JSON, CSV and Markdown for programs, errors on stderr."""

from __future__ import annotations

import csv
import difflib
import enum
import io
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable
from typing import Annotated, Any

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLATFORMS = ("cpu", "gpu", "tpu")
DTYPES = (
    "float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
OK, FAILED, USAGE = 0, 1, 2  # exit codes: done; a check did not hold; wrong arguments or input

FOLDED = 16  # columns: what long cells keep on a narrow terminal
PADDED = 80  # columns: longer cells of lines in a pipe do not push those of other lines away


class Format(enum.StrEnum):
    """How results are written."""

    table = "table"
    json = "json"


AsFormat = Annotated[Format, typer.Option("--format", help="table or json")]


def console() -> Console:
    """A console on stdout; without colours and an end to lines where stdout is a pipe or file."""
    made = Console(highlight=False)
    made.soft_wrap = not made.is_terminal
    return made


def write_json(value: Any) -> None:
    """`value` on stdout."""
    print(json.dumps(value, indent=1))


def write_table(title: str, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
    """Rows of the same keys as a table on stdout; columns of numbers are flush right.

    In a pipe or file a row is a line. On a terminal long cells are folded; where it is too narrow for the columns, each row is
    a list of them.
    """
    out = console()
    if title:
        out.print(title, style="bold", markup=False)
    if not rows:
        out.print("  none")
        return
    columns = columns or list(rows[0])
    cells = [[plain(row.get(column)).replace("\n", " ") for column in columns] for row in rows]
    headings = [column.replace("_", " ") for column in columns]
    widths = [max(map(cell_len, column)) for column in zip(headings, *cells, strict=True)]
    numbers = [all(type(row.get(column)) in (int, float) for row in rows) for column in columns]
    if not out.is_terminal:
        widths = [min(width, PADDED) for width in widths]
    if not out.is_terminal or sum(widths) + 2 * len(widths) <= out.width:
        out.print(_aligned(columns, headings, cells, widths, numbers), soft_wrap=True)
    elif sum(min(width, FOLDED) + 2 for width in widths) > out.width:
        out.print(_listed(columns, headings, cells))
    else:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
        for heading, number in zip(headings, numbers, strict=True):
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(text, _style(c, text)) for c, text in zip(columns, row, strict=True)))
        out.print(table)


def _aligned(
    columns: list[str], headings: list[str], cells: list[list[str]], widths: list[int], numbers: list[bool]
) -> Text:
    """A line for each row. rich's own tables take milliseconds for each, and there are hundreds."""
    text = Text()

    def add(row: list[str], styles: list[str]) -> None:
        last = len(row) - 1
        for i, (cell, width, number, style) in enumerate(zip(row, widths, numbers, styles, strict=True)):
            space = " " * (width - cell_len(cell))
            text.append("  " + space if number else "  ")
            text.append(cell, style)
            text.append("" if number or i == last else space)
        text.append("\n")

    text.append("\n")
    add(headings, ["bold"] * len(headings))
    text.append(" " + "─" * (sum(widths) + 2 * len(widths)) + "\n")
    for row in cells:
        add(row, [_style(c, cell) for c, cell in zip(columns, row, strict=True)])
    return text


def _listed(columns: list[str], headings: list[str], cells: list[list[str]]) -> Text:
    """A paragraph for each row, what is not empty in a line of its own."""
    text = Text()
    for row in cells:
        text.append("\n")
        for column, heading, cell in zip(columns, headings, row, strict=True):
            if cell:
                text.append(f"{heading}: ", "bold").append(cell, _style(column, cell)).append("\n")
    return text


_STYLES = {
    "missing": "red", "quarantined": "red", "wrong": "red", "fail": "red", "worse": "red",
    "disabled": "yellow", "note": "yellow", "lowered": "green", "loaded": "green", "ok": "green", "better": "green",
}  # fmt: skip


def _style(column: str, text: str) -> str:
    return _STYLES.get(text, "") if column in ("how", "state", "change") else ""


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
    """Write a file, whole or not at all. What a link leads to is written; a pipe or a device is written to."""
    if path.exists() and not path.is_file() and not path.is_dir():  # /dev/stdout, /dev/null, a named pipe
        path.write_text(text, "utf-8")
        return
    path = path.resolve()
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask()
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def epilog(text: str) -> str:
    """The end of a help text, its lines as they are."""
    return "\n\n".join("\b\n" + paragraph for paragraph in text.split("\n\n"))


def fail(message: str) -> typer.Exit:
    """Say on stderr what is wrong with the arguments or the input; raise what it returns: the command exits with 2."""
    print(message, file=sys.stderr)
    return typer.Exit(USAGE)


def among(names: Iterable[str]) -> Callable[[str], list[str]]:
    """For shell completion: those of `names` that begin as what is typed."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def unknown(what: str, given: str, known: Iterable[str]) -> typer.Exit:
    """`fail` for a name that is none of those known: says the closest ones, or all."""
    there = list(known)
    near = difflib.get_close_matches(given, there, 3, 0.6) if len(there) > 8 else []
    return fail(
        f"no {what} {given!r}; "
        + (f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(there) or 'none'}")
    )


def require(what: str, given: str | None, known: Collection[str]) -> None:
    """End the command if a name is given that is none of those known."""
    if given is not None and given not in known:
        raise unknown(what, given, known)


def torch_dtype(name: str | None) -> Any:
    """The dtype of torch of this name; None for None. If there is none, the command ends."""
    import torch

    found = getattr(torch, name, None) if name else None
    if name and not isinstance(found, torch.dtype):
        raise unknown("dtype", name, sorted(n for n, value in vars(torch).items() if isinstance(value, torch.dtype)))
    return found
