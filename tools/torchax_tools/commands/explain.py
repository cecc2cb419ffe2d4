"""`explain`: who serves a call of an operator, step by step."""

from __future__ import annotations

from typing import Annotated

import typer

from ..output import (
    DTYPES,
    PLATFORMS,
    AsFormat,
    Format,
    among,
    console,
    epilog,
    fail,
    require,
    torch_dtype,
    write_json,
    write_table,
)
from .listing import ops_that_begin

EXAMPLES = """\
Examples:
  torchax-ops explain softplus
  torchax-ops explain add_.Tensor --dtype bfloat16 --platform tpu
  torchax-ops explain mm --platform tpu --dtype bfloat16 --shape 512x512 --shape 512x512
  torchax-ops explain gelu --dtype float16 --shape 8x8 --arg approximate=tanh

Exit codes: 0; 2 if there is no such operator, dtype or argument."""


def explain(
    op: Annotated[
        str,
        typer.Argument(
            help="add, add.Tensor, aten::add.Tensor or torch.ops.aten.add.Tensor", autocompletion=ops_that_begin
        ),
    ],
    platform: Annotated[
        str | None, typer.Option(help="cpu, gpu or tpu; default: JAX's own", autocompletion=among(PLATFORMS))
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype of the first tensor, e.g. bfloat16", autocompletion=among(DTYPES))
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="shape of a tensor, 2x3 or scalar; once for each, in order")
    ] = None,
    arg: Annotated[list[str] | None, typer.Option(help="another argument, name=value, for predicates")] = None,
    format: AsFormat = Format.table,
) -> None:
    """Who carries an op out, and why: each candidate with the reason it is taken or passed over."""
    import jax
    import torchax  # noqa: F401  loads the plugins
    from torchax import _lookup

    from ..explanation import BadCall, Question, parse_argument, parse_shape
    from ..explanation import explain as answer

    found = _lookup.find(op)
    if not found:
        near = _lookup.closest(op)
        raise fail(f"torch has no op {op!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    wanted = torch_dtype(dtype)
    require("platform", platform, PLATFORMS)
    answers, refused = [], None
    try:
        question = Question(
            platform or jax.default_backend(),
            wanted,
            tuple(parse_shape(s) for s in shape or ()),
            tuple(parse_argument(a) for a in arg or ()),
        )
    except BadCall as error:
        raise fail(str(error)) from None
    for func in found:
        try:
            answers.append(answer(func, question))
        except BadCall as error:
            refused = error
    if not answers:  # of several overloads some may not take these arguments
        raise fail(str(refused))
    if format is Format.json:
        write_json(answers)
        return
    out = console()
    for each in answers:
        out.print(each["schema"], style="bold", markup=False)
        by = f", by {each['provider']}" if each["provider"] else ""
        out.print(f"  {each['kind']}{by}: {each['meaning']}", markup=False)
        several = len({step["op"] for step in each["steps"]}) > 1
        columns = ["op", "step", "result"] if several else ["step", "result"]
        write_table("", each["steps"], columns)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explain", epilog=epilog(EXAMPLES))(explain)
