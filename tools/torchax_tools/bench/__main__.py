"""``python -m torchax_tools.bench [GROUP ...] [--json FILE]``: measure, and report ratios. Never fails for being slow."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .measure import Row, failed

GROUPS = (
    "import",
    "ops",
    "linear",
    "threads",
    "train",
    "families",
    "gpt",
    "calls",
    "steps",
    "depth",
    "decode",
    "cold",
    "presence",
    "tpu",
    "zoo",
)


def _group(name: str) -> Callable[[], Iterator[Row]]:
    from . import calls, decode, depth, families, gpt, ops, presence, startup, steps, tpu, train, zoo

    return {
        "import": startup.imports,
        "ops": ops.ops,
        "linear": ops.linear,
        "threads": ops.threads,
        "train": train.train,
        "families": families.families,
        "gpt": gpt.gpt,
        "calls": calls.calls,
        "steps": steps.steps,
        "depth": depth.depth,
        "decode": decode.decode,
        "cold": startup.cold,
        "presence": presence.presence,
        "tpu": tpu.tpu,
        "zoo": zoo.zoo,
    }[name]


def _amount(value: float | None, counted: str = "s") -> str:
    if value is None:
        return ""
    if counted != "s":
        return f"{value:,.0f} {counted}".strip()
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.2f} us"


def report(rows: list[Row]) -> Table:
    """The rows as a table; a goal that is not reached stands out."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for heading in ("group", "what", "value", "goal", "against", "torchax", "other", "torch CPU"):
        table.add_column(
            heading, justify="right" if heading in ("value", "goal", "torchax", "other", "torch CPU") else "left"
        )
    last = ""
    for row in rows:
        if row.group != last:
            table.add_section()
        group, last = (row.group if row.group != last else ""), row.group
        if row.error:
            table.add_row(group, row.name, "-", "", f"[red]{row.error}[/red]")
            continue
        style = {True: "green", False: "yellow", None: ""}[row.reached]
        value = "-" if row.value is None else f"{row.value:.2f} {row.unit}"
        goal = "" if row.goal is None else f"{'>=' if row.more else '<='} {row.goal:g}"
        table.add_row(
            group,
            row.name,
            f"[{style}]{value}[/{style}]" if style else value,
            goal,
            row.against,
            _amount(row.ours, row.counted),
            _amount(row.theirs, row.counted),
            _amount(row.torch_cpu),
        )
    return table


def environment() -> dict[str, str]:
    """What was measured, and on what."""
    import os
    import platform

    import jax
    import torch
    import torchax

    return {
        "torchax": torchax.__version__,
        "torch": torch.__version__,
        "jax": jax.__version__,
        "platform": jax.devices()[0].platform,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def main(
    groups: Annotated[list[str] | None, typer.Argument(help="some of: " + ", ".join(GROUPS) + "; default all")] = None,
    file: Annotated[pathlib.Path | None, typer.Option("--json", help="write the figures into this file")] = None,
) -> None:
    """Measure torchax and report ratios."""
    unknown = set(groups or ()) - set(GROUPS)
    if unknown:
        raise typer.BadParameter(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    warnings.filterwarnings("ignore")
    console = Console()
    if not console.is_terminal:
        console.width = 140
    rows: list[Row] = []
    with console.status("measuring") as status:
        for name in GROUPS:
            if groups and name not in groups:
                continue
            try:
                for row in _group(name)():
                    rows.append(row)
                    status.update(f"measuring: {row.group}, {row.name}")
            except Exception as error:  # the other groups are still worth their time
                rows.append(failed(name, "the rest", error))
    about = environment()
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    console.print(report(rows))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps({"environment": about, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"
        )
        console.print(f"written: {file}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
