"""Names that existing users of torchax call. Importing torchax is enough; none of these has to be called for results to be right."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import torch
from torch.utils._pytree import tree_map

from . import convert
from . import random as _random
from ._registry import REGISTRY, Lowering, op_name
from .config import config
from .tensor import Tensor


class Settings:
    """`torchax.config` as users of earlier versions set it.

    What was chosen there by hand is decided by itself now: kernels by platform, dtype and shape (`torchax.config.pallas`), and
    tensors of CPU are CPU's. So these settings are remembered, and change nothing.
    """

    former: ClassVar[dict[str, Any]] = {
        "use_tpu_flash_attention": False,
        "use_tpu_splash_attention": False,
        "shmap_flash_attention": False,
        "use_torch_native_for_cpu_tensor": True,
        "use_dlpack_for_data_conversion": False,
        "treat_cuda_as_jax_device": True,
        "internal_respect_torch_return_dtypes": False,
        "debug_print_each_op": False,
        "debug_accuracy_for_each_op": False,
        "debug_mixed_tensor": False,
    }

    def __getattr__(self, name: str) -> Any:
        return self.former[name] if name in self.former else getattr(config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.former:
            self.former[name] = value
        else:
            setattr(config, name, value)


_settings = Settings()


class Environment:
    """What `default_env` gives: conversions, seeds and settings; as a context manager it does nothing, since nothing is needed."""

    @property
    def config(self) -> Settings:
        """`torchax.config`, which takes the settings of earlier versions, too."""
        return _settings

    enabled = True

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
        """The PRNG key that device ``jax`` uses next. Reading it takes nothing away: `get_and_rotate_prng_key` does."""
        return _random.draw(jax.numpy.asarray(_random.default(0).load()))[0]

    get_and_rotate_prng_key = functools.partialmethod(
        lambda self, generator=None: _random.source(generator, 0).next_key()
    )

    def j2t_iso(self, tree: Any) -> Any:
        """Every `jax.Array` of a nest as a tensor."""
        return jax.tree.map(lambda x: Tensor(x) if isinstance(x, jax.Array) else x, tree)

    def t2j_iso(self, tree: Any) -> Any:
        """Every tensor of a nest as a `jax.Array`."""
        return tree_map(lambda x: x._array() if isinstance(x, Tensor) else x, tree)

    def j2t_copy(self, tree: Any) -> Any:
        """Every `jax.Array` of a nest as a CPU tensor."""
        return jax.tree.map(lambda x: convert.j2t(x) if isinstance(x, jax.Array) else x, tree)

    def t2j_copy(self, tree: Any) -> Any:
        """Every tensor of a nest, CPU ones included, as a `jax.Array`."""
        return tree_map(lambda x: convert.t2j(x) if isinstance(x, torch.Tensor) else x, tree)

    def to_xla(self, tree: Any) -> Any:
        """Every tensor of a nest, or a module, on device ``jax``."""
        return tree_map(lambda x: x.to("jax") if isinstance(x, torch.Tensor | torch.nn.Module) else x, tree)

    def load_ops(self) -> None:
        """Nothing to do: plugins are loaded with torchax."""

    def override_op_definition(self, op: Any, fn: Any) -> None:
        """Carry out `op` by `fn` from now on.

        Args:
            op: an operator (``torch.ops.aten.sinc``), for which `fn` takes and gives `jax.Array`s; or a function of torch
                (``torch.nn.functional.scaled_dot_product_attention``), for which it takes and gives tensors, see
                `torchax.ops.jtorch.register_function`.
            fn: what to call instead.
        """
        if not isinstance(op, str | torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            from .ops.jtorch import register_function

            register_function(op, is_jax_function=False)(fn)
            return
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
