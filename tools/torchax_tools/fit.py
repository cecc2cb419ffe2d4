"""Steps of models as the TPU compiler sees them, for the command `fit`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torchax import interop

from .scan import BadProgram, load_factory, program_of

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}
SHARDINGS: dict[str, Callable[[], Any]] = {
    "data": lambda: interop.data_parallel("data"),
    "fsdp": lambda: interop.fsdp("data"),
    "tensor": lambda: interop.tensor_parallel("model"),
    "fsdp+tensor": lambda: [interop.tensor_parallel("model"), interop.fsdp("data")],
}


def parse_mesh(text: str | None) -> dict[str, int] | None:
    """``data=4,model=2`` as a dict.

    Raises:
        BadProgram: it is not written so.
    """
    if text is None:
        return None
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name in axes or not name.isidentifier() or not size.lstrip("-").isdigit():
            raise BadProgram(f"--mesh {text!r}: write the sizes of axes, each once, data=4,model=2; one may be -1")
        axes[name] = int(size)
    return axes


def load_step(
    text: str, *, batch: int | None, length: int, dtype: str | None, optimizer: str | None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step that a factory stands for, and its arguments, without values.

    Args:
        text: ``MODULE:FACTORY``.
        batch: size of dimension 0 of the arguments; None leaves them as they are.
        length: of sequences, where the factory gives a model of transformers alone.
        dtype: floating-point parameters and arguments are of this dtype; None leaves them as they are.
        optimizer: a key of `OPTIMIZERS`: a module is trained; None: it is only called.

    Raises:
        BadProgram: the factory cannot be called, or makes something else.
    """
    factory = load_factory(text)
    try:
        with torch.device("meta"), contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            made = factory()
    except (Exception, SystemExit) as error:
        raise BadProgram(f"{text} failed: {type(error).__name__}: {error}") from None
    alone = isinstance(made, torch.nn.Module)
    function, args, kwargs = program_of(made, text)
    if alone and "input_ids" in kwargs:  # transformers' dummy inputs are short
        tokens = torch.empty(batch or 1, length, dtype=torch.int64, device="meta")
        kwargs = {"input_ids": tokens, "labels": tokens} if optimizer else {"input_ids": tokens}
    elif batch is not None:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: _of_batch(t, batch), (args, kwargs))
    if not isinstance(function, torch.nn.Module):
        return (lambda args, kwargs: function(*args, **kwargs)), (args, kwargs)
    if dtype is not None:
        wanted = getattr(torch, dtype)
        function = function.to(wanted)
        cast = lambda t: t.to(wanted) if t.is_floating_point() else t
        args, kwargs = pytree.tree_map_only(torch.Tensor, cast, (args, kwargs))
    if optimizer is None:
        return _inference(function.eval()), (args, kwargs)
    return _training(function.train(), OPTIMIZERS[optimizer]), (args, kwargs)


def _of_batch(t: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.empty(batch, *t.shape[1:], dtype=t.dtype, device="meta") if t.dim() else t


def _inference(model: torch.nn.Module) -> Callable[..., Any]:
    def call(args: Any, kwargs: Any) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return call


def _training(model: torch.nn.Module, kind: Callable[[Any], torch.optim.Optimizer]) -> Callable[..., Any]:
    parameters = list(model.parameters())
    if not parameters:
        raise BadProgram(f"{type(model).__name__} has no parameters to train; --inference compiles a call of it")
    optimizer = kind(parameters)

    def step(args: Any, kwargs: Any) -> torch.Tensor:
        optimizer.zero_grad()
        out = model(*args, **kwargs)
        loss = getattr(out, "loss", None)
        if loss is None:  # any scalar that depends on everything: what it is does not change what fits
            tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
            loss = torch.stack([t.float().square().mean() for t in tensors]).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
