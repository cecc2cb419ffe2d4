"""Names that existing users of torchax call. Importing torchax is enough; none of these has to be called for results to be right."""

from __future__ import annotations

import functools
from typing import Any

import jax
import torch
from torch.utils._pytree import tree_map

from . import convert
from . import random as _random
from ._registry import REGISTRY, Lowering, op_name
from .config import Config, config
from .tensor import Tensor


class Environment:
    """What `default_env` gives: conversions, seeds and settings; as a context manager it does nothing, since nothing is needed."""

    @property
    def config(self) -> Config:
        """`torchax.config`."""
        return config

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def enable_torch_modes(self) -> None:
        """Nothing to do: there are no modes."""

    disable_torch_modes = enable_torch_modes

    def manual_seed(self, seed: int) -> None:
        """Seed device ``jax``: `torch.jax.manual_seed`."""
        _random.manual_seed(0, seed)

    @property
    def prng_key(self) -> jax.Array:
        """A fresh PRNG key from the state of device ``jax``."""
        return _random.default(0).next_key()

    get_and_rotate_prng_key = functools.partialmethod(
        lambda self, generator=None: _random.source(generator, 0).next_key()
    )

    def j2t_iso(self, tree: Any) -> Any:
        """Every `jax.Array` of a nest as a tensor."""
        return jax.tree.map(lambda x: Tensor(x) if isinstance(x, jax.Array) else x, tree)

    def t2j_iso(self, tree: Any) -> Any:
        """Every tensor of a nest as a `jax.Array`."""
        return tree_map(lambda x: x._array() if isinstance(x, Tensor) else x, tree)

    j2t_copy = j2t_iso

    def t2j_copy(self, tree: Any) -> Any:
        """Every tensor of a nest, CPU ones included, as a `jax.Array`."""
        return tree_map(lambda x: convert.t2j(x) if isinstance(x, torch.Tensor) else x, tree)

    def to_xla(self, tree: Any) -> Any:
        """Every tensor of a nest on device ``jax``."""
        return tree_map(lambda x: x.to("jax") if isinstance(x, torch.Tensor) else x, tree)

    def override_op_definition(self, op: Any, fn: Any) -> None:
        """Lower `op` by `fn` from now on, before every plugin."""
        if isinstance(op, torch._ops.OpOverloadPacket):
            op = op.default if "default" in op.overloads() else getattr(op, op.overloads()[0])
        REGISTRY.add(
            Lowering(
                op=op_name(op),
                fn=fn,
                provider=f"override {len(REGISTRY.lowerings(op))}",
                priority=1000 + len(REGISTRY.lowerings(op)),
            )
        )


_environment = Environment()


def default_env() -> Environment:
    """The one environment."""
    return _environment


def enable_globally() -> Environment:
    """Nothing to do: device ``jax`` is there once torchax is imported."""
    return _environment


def disable_globally() -> None:
    """Nothing to do: there is no mode to leave."""


def enable_accuracy_mode() -> None:
    """Matrix products in full float32 precision on every platform."""
    jax.config.update("jax_default_matmul_precision", "highest")


def enable_performance_mode() -> None:
    """Matrix products in the platform's fastest precision."""
    jax.config.update("jax_default_matmul_precision", "default")
