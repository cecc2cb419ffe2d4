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
from .topology import compared, compiled_for

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


def _against_plain(
    name: str, function: Callable[..., Any], operands: tuple[torch.Tensor, ...], topology: str
) -> Iterator[Row]:
    found: dict[str, AotCompiled] = {}
    try:
        for mode in ("auto", "off"):
            with torchax.config.override(pallas=mode):
                found[mode] = aot_compile(function, operands, topology, mesh={"data": 1})
    except Exception as error:
        yield failed("tpu", name, error)
        return
    ours, plain = found["auto"], found["off"]
    for what, unit in (
        ("temporary_bytes", "MiB"), ("flops", "GFLOP"), ("bytes_accessed", "MiB"), ("roofline_seconds", "s"),
    ):  # fmt: skip
        scale = {"MiB": 2**20, "GFLOP": 1e9, "s": 1}[unit]
        mine, other = (getattr(x, what) for x in (ours, plain))
        title = f"{name}: {what.rpartition('_')[0] or what}"
        if mine is None or other is None:
            against = "without kernels, which does not fit" if plain.fits is False else "without kernels"
            yield Row("tpu", title, None, "", against, ours=None if mine is None else mine / scale, counted=unit)
        else:
            yield Row(
                "tpu", title, mine / other, "x", "without kernels", None, mine / scale, other / scale, counted=unit
            )


# ---------------------------------------------------------------------- models
def _against_jax(
    name: str, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer: Any, loss: Any, transform: Any
) -> Iterator[Row]:
    topology = _TOPOLOGIES[0]
    mine = aot_compile(torch_step(model, optimizer(model.parameters())), (x, y), topology, mesh={"data": 1})
    held, batch = arrays_of(model, x, y, transform)
    theirs = compiled_for(jax_step(loss, transform), [*held, *batch], topology)
    yield from compared("tpu", f"{name}, v5e", mine, theirs, "JAX + optax")
