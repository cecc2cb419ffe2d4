"""Lower an operator yourself: a plugin that takes over GELU for matrices, and one more operator of your own.

python examples/plugin_lowering.py
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import torch
import torch.nn.functional as F
import torchax
from torchax.hookspecs import hookimpl
from torchax.ops import REGISTRY, aten, lowering

calls: list[str] = []  # what was traced; a compiled program does not come back here


def is_matrix(x: Any, approximate: str = "none") -> bool:
    """The predicate: it sees shapes and dtypes in place of tensors."""
    return len(x.shape) == 2


@lowering(aten.gelu.default, promote="default", when=is_matrix, priority=10)
def sigmoid_gelu(x: Any, approximate: str = "none") -> Any:
    """x sigmoid(1.702 x), a cheap approximation."""
    calls.append("sigmoid_gelu")
    return x / (1 + jnp.exp(-1.702 * x))


library = torch.library.Library("example", "DEF")
library.define("scaled_rms(Tensor x, Tensor scale, float eps=1e-6) -> Tensor")


@torch.library.register_fake("example::scaled_rms")
def _(x: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return torch.empty_like(x)


@lowering("example::scaled_rms", promote="default", promote_only=("x", "scale"))
def scaled_rms(x: Any, scale: Any, eps: float = 1e-6) -> Any:
    """x over its root mean square along the last axis, times scale."""
    calls.append("scaled_rms")
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


class ExamplePlugin:
    @hookimpl
    def torchax_plugin_info(self) -> dict[str, Any]:
        return {"name": "example", "version": "1.0", "api": "1.0", "summary": "an example", "url": ""}

    @hookimpl
    def torchax_register_ops(self, registry: Any) -> None:
        for function in (sigmoid_gelu, scaled_rms):
            for entry in function.__torchax__:
                registry.add(entry)


def main() -> None:
    torchax.plugins.register(ExamplePlugin(), "example")
    x = torch.linspace(-2, 2, 8, device="jax")

    print("vector:", F.gelu(x)[:2])
    print("matrix:", F.gelu(x.view(2, 4))[0, :2])
    assert calls == ["sigmoid_gelu"]  # for the matrix only

    print("in place, from the same lowering:", torch.ops.aten.gelu_(x.clone().view(2, 4))[0, :2])

    normed = torch.ops.example.scaled_rms(x.view(2, 4), torch.ones(4, device="jax"))
    print("an operator of our own:", normed.square().mean(-1))
    torch.testing.assert_close(normed.square().mean(-1).cpu(), torch.ones(2))

    print("who may serve gelu:")
    for verdict in REGISTRY.explain(aten.gelu.default, "cpu", torch.float32):
        print(f"  {verdict.lowering.provider:8} priority {verdict.lowering.priority:2}: {verdict.reason}")

    torchax.plugins.disable("example")
    print("switched off:", F.gelu(x.view(2, 4))[0, :2])
    torch.testing.assert_close(F.gelu(x.view(2, 4)).cpu(), F.gelu(x.cpu().view(2, 4)))


if __name__ == "__main__":
    main()
