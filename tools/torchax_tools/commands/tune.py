"""`tune`: block sizes of kernels, found by timing them on this machine's TPU."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from ..output import AsFormat, Format, console, epilog, fail, plain, write_json, write_table

EXAMPLES = """\
Examples:
  torchax-ops tune attention 8192 8192 128
  torchax-ops tune grouped_matmul 8192 1408 2048 --dtype float32
  torchax-ops tune grouped_outer 8192 2048 1408 --format json --no-save

Sizes are those of a call: of attention its queries, keys and features of a head; of a product its rows, what is summed over (for
grouped_outer: columns of the left operand), and its columns. What is found also serves calls whose sizes, each rounded up to a power of
two, are the same. It is written into the file that torchax.config.pallas_table or TORCHAX_PALLAS_TABLE names.

Exit codes: 0 done; 2 wrong arguments, or no TPU."""


def tune(
    kernel: Annotated[str, typer.Argument(help="attention, grouped_matmul, grouped_outer")],
    sizes: Annotated[list[int], typer.Argument(help="of a call", min=1)],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    save: Annotated[bool, typer.Option("--save/--no-save", help="use what is found from now on")] = True,
    format: AsFormat = Format.table,
) -> None:
    """Time a kernel with every block size that the compiler accepts, on the TPU of this machine."""
    import torchax  # noqa: F401  declares the settings

    try:
        from torchax_ops_pallas.tuning import NoTPU, autotune
    except ImportError:
        raise fail("the kernels are not installed: pip install 'torchax[pallas]'") from None
    try:
        found = autotune(kernel, sizes, dtype, save=save, report=_said)
    except (NoTPU, ValueError, RuntimeError, OSError) as error:
        raise fail(str(error)) from None
    if format is Format.json:
        write_json({**dataclasses.asdict(found), "path": found.path and str(found.path)})
        return
    trials = sorted(found.trials, key=lambda t: (t.seconds is None, t.seconds or 0.0))
    write_table(f"{found.kernel} {plain(found.sizes)}, {found.dtype}, {found.kind}", [_row(t) for t in trials])
    if found.path is not None:
        console().print(f"written: {found.path}", markup=False)


def _row(trial: Any) -> dict[str, Any]:
    times = {"milliseconds": None if trial.seconds is None else round(1e3 * trial.seconds, 4), "refused": trial.refusal}
    return {**dataclasses.asdict(trial.blocks), **times}


def _said(trial: Any) -> None:
    took = "refused by the compiler" if trial.seconds is None else f"{1e3 * trial.seconds:.4g} ms"
    blocks = ", ".join(f"{name} {n}" for name, n in dataclasses.asdict(trial.blocks).items())
    print(f"{blocks}: {took}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tune", epilog=epilog(EXAMPLES))(tune)
