"""What the TPU compiler makes of programs: kernels against plain lowerings, models against hand-written JAX. No TPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torchax
from torchax.interop import AotCompiled, aot_compile

from .measure import Row, failed
from .steps import arrays_of, cases, jax_step, torch_step
from .topology import chips, compared, compiled_for

_TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
_HEADS, _FEATURES = 8, 128
_LENGTHS = (2048, 8192, 32768)
_TOKENS, _GROUPS, _INSIDE, _OUTSIDE = 8192, 64, 2048, 1408


def tpu() -> Iterator[Row]:
    """Rows of the group `tpu`: one chip each, forward and backward, bfloat16."""
    for topology in _TOPOLOGIES:
        chip = topology.partition(":")[0]
        for length in _LENGTHS:
            yield from _against_plain(f"attention {length}, {chip}", _attention, _qkv(length), topology)
        yield from _against_plain(f"grouped_mm, {chip}", _grouped, _operands_of_groups(), topology)
        for rows in _ROWS:
            wide, narrow = (_mlp, _mlp_operands(rows)), (_mlp_of_int8, _int8_operands(rows))
            yield from _against(f"MLP of int8 weights, {rows} rows, {chip}", narrow, wide, topology, "bfloat16 weights")
        head, plain = ((function, _head_operands()) for function in (_head, _plain_head))
        yield from _against(f"linear_cross_entropy, {chip}", head, plain, topology, "linear, then cross_entropy")
    for name, model, x, y, optimizer, loss, transform in cases():
        try:
            yield from _against_jax(name, model, x, y, optimizer, loss, transform)
        except Exception as error:
            yield failed("tpu", name, error)


# ---------------------------------------------------------------------- kernels
def _meta(*shape: int, **options: Any) -> torch.Tensor:
    return torch.empty(shape, device="meta", **{"dtype": torch.bfloat16, "requires_grad": True, **options})


def _qkv(length: int) -> tuple[torch.Tensor, ...]:
    return tuple(_meta(1, _HEADS, length, _FEATURES) for _ in range(3))


def _attention(*qkv: torch.Tensor) -> Any:
    query, key, value = qkv
    return torch.autograd.grad(
        F.scaled_dot_product_attention(query, key, value, is_causal=True).float().sum(), (query, key, value)
    )


def _operands_of_groups() -> tuple[torch.Tensor, ...]:
    ends = _meta(_GROUPS, dtype=torch.int32, requires_grad=False)
    return _meta(_TOKENS, _INSIDE), _meta(_GROUPS, _INSIDE, _OUTSIDE), ends


def _grouped(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> Any:
    return torch.autograd.grad(F.grouped_mm(x, matrices, offs=ends).float().sum(), (x, matrices))


_ROWS, _WIDTH, _INNER, _CLASSES = (8, 8192), 4096, 14336, 128256


def _mlp_operands(rows: int) -> tuple[torch.Tensor, ...]:
    sizes = ((rows, _WIDTH), (_INNER, _WIDTH), (_INNER, _WIDTH), (_WIDTH, _INNER))
    return tuple(_meta(*size, requires_grad=False) for size in sizes)


def _mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _int8_operands(rows: int) -> tuple[torch.Tensor, ...]:
    x, *weights = _mlp_operands(rows)
    return x, *(w.to(torch.int8) for w in weights), *(_meta(w.shape[0], requires_grad=False) for w in weights)


def _mlp_of_int8(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
    gate, up, down = zip(given[:3], given[3:], strict=True)  # weights with a scale for each output
    product = torch.ops.aten._weight_int8pack_mm
    return product(F.silu(product(x, *gate)) * product(x, *up), *down)


def _head_operands() -> tuple[torch.Tensor, ...]:
    return _meta(_TOKENS, _WIDTH), _meta(_CLASSES, _WIDTH), _meta(_TOKENS, dtype=torch.int64, requires_grad=False)


def _head(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
    return torch.autograd.grad(F.linear_cross_entropy(x, weight, target), (x, weight))


def _plain_head(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
    return torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), (x, weight))


_UNITS = {"temporary_bytes": "MiB", "flops": "GFLOP", "bytes_accessed": "MiB", "roofline_seconds": "s"}
_Program = tuple[Callable[..., Any], tuple[torch.Tensor, ...]]


def _against_plain(
    name: str, function: Callable[..., Any], operands: tuple[torch.Tensor, ...], topology: str
) -> Iterator[Row]:
    program = function, operands
    yield from _against(name, program, program, topology, "without kernels", mode="off")


def _against(
    name: str, ours: _Program, other: _Program, topology: str, against: str, mode: str = "auto"
) -> Iterator[Row]:
    """Rows of what two programs need; the other one with ``torchax.config.pallas`` as `mode`."""
    found: list[AotCompiled] = []
    try:
        for (function, operands), pallas in ((ours, "auto"), (other, mode)):
            with torchax.config.override(pallas=pallas):
                found.append(aot_compile(function, operands, topology, mesh={"data": 1}))
    except Exception as error:
        yield failed("tpu", name, error)
        return
    for what, unit in _UNITS.items():
        scale = {"MiB": 2**20, "GFLOP": 1e9, "s": 1}[unit]
        mine, theirs = (getattr(x, what) for x in found)
        title = f"{name}: {what.rpartition('_')[0] or what}"
        if mine is None or theirs is None:
            said = f"{against}, which does not fit" if found[1].fits is False else against
            yield Row("tpu", title, None, "", said, ours=None if mine is None else mine / scale, counted=unit)
        else:
            value = mine / theirs if theirs else None
            yield Row("tpu", title, value, "x", against, None, mine / scale, theirs / scale, counted=unit)


# ---------------------------------------------------------------------- models
def _against_jax(
    name: str, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer: Any, loss: Any, transform: Any
) -> Iterator[Row]:
    topology = _TOPOLOGIES[0]
    mine = aot_compile(torch_step(model, optimizer(model.parameters())), (x, y), topology, mesh={"data": 1})
    held, batch = arrays_of(model, x, y, transform)
    theirs = compiled_for(jax_step(loss, transform), [*held, *batch], chips(topology))
    yield from compared("tpu", f"{name}, v5e", mine, theirs, "JAX + optax")
