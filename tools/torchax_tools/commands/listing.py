"""`list` and `plugins`: what is registered, and by whom."""

from __future__ import annotations

import difflib
import sys
from typing import Annotated, Any

import typer

from ..output import AsFormat, Format, among, epilog, require, write_json, write_table

LIST_EXAMPLES = """\
Examples:
  torchax-ops list softplus                  lowerings of operators with softplus in their name
  torchax-ops list --plugin pallas           everything that a plugin lowers

The list is kept in a file (~/.cache/torchax) until a plugin or a version changes; --fresh makes it again."""


def ops_that_begin(incomplete: str) -> list[str]:
    """Names of operators for shell completion."""
    from ..index import rows

    short = "" if "::" in incomplete else "aten::"
    return among(sorted({row["op"].removeprefix(short) for row in rows()}))(incomplete)


def families_that_begin(incomplete: str) -> list[str]:
    """Families of lowerings for shell completion."""
    from ..index import rows

    return among(sorted({row["family"] for row in rows()}))(incomplete)


def plugins_that_begin(incomplete: str) -> list[str]:
    """Names of installed plugins for shell completion."""
    import importlib.metadata

    names = {e.name for e in importlib.metadata.entry_points(group="torchax.plugins")}
    return among(sorted(names))(incomplete)


def list_ops(
    pattern: Annotated[str, typer.Argument(help="part of the op's name", autocompletion=ops_that_begin)] = "",
    plugin: Annotated[
        str | None, typer.Option(help="only lowerings of this plugin", autocompletion=plugins_that_begin)
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="only this family: pointwise, norm, ...", autocompletion=families_that_begin)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="load the plugins, do not read the kept list")] = False,
    format: AsFormat = Format.table,
) -> None:
    """Every lowering: op, kind, plugin, family, priority and condition."""
    from ..index import rows

    everything = rows(fresh)
    found = [
        row
        for row in everything
        if pattern in row["op"] and plugin in (None, row["plugin"]) and family in (None, row["family"])
    ]
    require("family", family, sorted({row["family"] for row in everything}))
    require("plugin", plugin, sorted({row["plugin"] for row in everything} | set(plugins_that_begin(""))))
    if pattern and not found:
        near = difflib.get_close_matches(pattern, dict.fromkeys(row["op"] for row in everything), 3, 0.6)
        near = near or difflib.get_close_matches(pattern, ops_that_begin(""), 3, 0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        print(f"no lowering of an operator with {pattern!r} in its name{hint}", file=sys.stderr)
    if format is Format.json:
        write_json(found)
    else:
        write_table(f"{len(found)} lowerings", found)


def plugins(format: AsFormat = Format.table) -> None:
    """Every plugin that was found, and what became of it: loaded, disabled or quarantined, and why."""
    from torchax import plugins as manager

    from ..index import rows as keep

    keep(fresh=True)  # the plugins are loaded now, so that list and completion need not load them
    rows = plugin_rows(manager)
    if format is Format.json:
        write_json(rows)
    else:
        write_table("", rows)


def plugin_rows(manager: Any) -> list[dict[str, Any]]:
    """What `torchax.plugins.status` says, flat."""
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


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list", epilog=epilog(LIST_EXAMPLES))(list_ops)
    app.command("plugins", epilog=epilog("Exit code: 0, whatever became of the plugins; doctor judges them."))(plugins)
