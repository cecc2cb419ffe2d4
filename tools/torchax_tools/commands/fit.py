"""`fit`: whether a model fits on TPUs that are not here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..output import FAILED, AsFormat, Format, console, epilog, fail, torch_dtype, write_json, write_table

EXAMPLES = """\
Examples:
  torchax-ops fit my_package.models:make --topology v5e:2x2 --shard fsdp --batch 8
  torchax-ops fit llama.py:make --topology v5p:2x2x2 --shard fsdp --batch 16 --seq 4096 --dtype bfloat16
  torchax-ops fit llama.py:make --topology v5e:2x4 --mesh data=2,model=4 --shard fsdp+tensor --inference

The factory takes no arguments and returns (module, arguments), (module, arguments, keywords), a model of transformers,
or (function, arguments) for a step of your own. It is called with meta as the default device: nothing is allocated.

Exit codes: 0 it fits; 1 it does not; 2 wrong arguments, or no compiler for TPU."""


def fit(
    program: Annotated[str, typer.Argument(help="MODULE:FACTORY or FILE.py:FACTORY")],
    topology: Annotated[
        str, typer.Option(help="generation and chips: v5e:2x2, v4:2x2x1, v5p:2x2x2, v6e:2x4")
    ] = "v5e:2x2",
    mesh: Annotated[
        str | None, typer.Option(help="sizes of axes, data=4,model=2; default: data over all chips")
    ] = None,
    shard: Annotated[str, typer.Option(help="data, fsdp, tensor or fsdp+tensor")] = "data",
    batch: Annotated[int | None, typer.Option(min=1, help="rows of the whole batch, over all chips")] = None,
    seq: Annotated[int, typer.Option(min=1, help="length of sequences, of a model of transformers")] = 2048,
    dtype: Annotated[str | None, typer.Option(help="of a module and its arguments: bfloat16, float32")] = None,
    train: Annotated[bool, typer.Option("--train/--inference", help="a step with its optimizer, or a call")] = True,
    optimizer: Annotated[str, typer.Option(help="adamw, adam or sgd")] = "adamw",
    format: AsFormat = Format.table,
) -> None:
    """Compile a step for TPUs that are not here: whether it fits in memory, and what it does."""
    import torchax  # noqa: F401  loads the plugins
    from torchax import interop

    from .. import fit as steps
    from ..scan import BadProgram

    for name, value, known in (("--shard", shard, steps.SHARDINGS), ("--optimizer", optimizer, steps.OPTIMIZERS)):
        if value not in known:
            raise fail(f"{name} {value!r}: one of {', '.join(known)}")
    torch_dtype(dtype)
    try:
        chosen = optimizer if train else None
        step, args = steps.load_step(program, batch=batch, length=seq, dtype=dtype, optimizer=chosen)
        rules = steps.SHARDINGS[shard]()
        found = interop.aot_compile(step, args, topology, mesh=steps.parse_mesh(mesh), shardings=rules)
    except (BadProgram, ValueError, ImportError) as error:
        raise fail(str(error)) from None
    except (Exception, SystemExit) as error:
        raise fail(f"{program}: the step cannot be compiled: {type(error).__name__}: {error}") from None
    if format is Format.json:
        write_json({"program": program, **found.as_dict()})
    else:
        _show(found)
    if not found.fits:
        raise typer.Exit(FAILED)


def _show(found: Any) -> None:
    out = console()
    axes = ", ".join(f"{name}={size}" for name, size in found.mesh.items())
    out.print(f"{found.topology}, {axes}: {'fits' if found.fits else 'does not fit'}", style="bold", markup=False)
    memory = [
        ("parameters, optimizer, gradients", found.state_bytes),
        ("of these not read, but held", found.held_bytes),
        ("arguments, with what of these is kept", found.argument_bytes),
        ("results", found.output_bytes),
        ("results that overwrite arguments", found.alias_bytes),
        ("temporaries", found.temporary_bytes),
        ("at one time, at most", found.peak_bytes),
        ("program", found.code_bytes),
        ("in all", found.total_bytes),
        ("memory of a chip", found.hbm_bytes),
    ]
    rows = [{"on each chip": name, "": _size(size)} for name, size in memory if size is not None]
    write_table("", rows)
    if found.problem:
        out.print(found.problem, markup=False)
        for line in found.advice:
            out.print(f"- {line}", markup=False)
        sizes = [{"largest values, over all chips": what, "": _size(n)} for what, n in found.largest.items()]
        write_table("", sizes)
        return
    work = [
        {"work of each chip": "operations", "": f"{found.flops:.3g}"},
        {"work of each chip": "bytes read and written", "": f"{found.bytes_accessed:.3g}"},
        {"work of each chip": "roofline: a bound, not a prediction", "": f"{found.roofline_seconds * 1e3:.3g} ms"},
    ]
    write_table("", work)
    sent = [{"collective": c.kind, "count": c.count, "MiB": round(c.bytes / 2**20, 2)} for c in found.collectives]
    write_table("Collectives", sent)
    write_table("Pallas kernels", [{"kernel": name, "calls": n} for name, n in found.kernels.items()])


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("fit", epilog=epilog(EXAMPLES))(fit)
