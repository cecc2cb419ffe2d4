"""The bridge between PyTorch and JAX: compile, views, gradients across, modules taken apart, checkpoints.

Everything here is also found as ``torchax.interop.NAME``.
"""

from __future__ import annotations

from . import control_flow
from ._mesh import make_mesh
from ._scan_layers import ScannedLayers, scan_layers
from .autograd import j2t_autograd
from .checkpoint import CheckpointManager, load_checkpoint, open_checkpoint, save_checkpoint
from .compile import Compiled, compile
from .custom_ops import register_jax
from .jit import JittableModule, extract_all_buffers, extract_jax, jax_jit
from .loops import fori_loop, scan
from .modules import JaxModule
from .optimizer import OptaxOptimizer
from .rules import Rule, by_name, data_parallel, fsdp, tensor_parallel
from .sharding import bytes_per_device, constrain, deferred_init, shard_batch, shard_module, shard_optimizer
from .transforms import gradient_checkpoint, jax_value_and_grad, jax_vmap, t2j_autograd
from .views import call_jax, call_torch, jax_view, shard_map, torch_view

__version__ = "0.1.0"

__all__ = [
    "CheckpointManager",
    "Compiled",
    "JaxModule",
    "JittableModule",
    "OptaxOptimizer",
    "Rule",
    "ScannedLayers",
    "by_name",
    "bytes_per_device",
    "call_jax",
    "call_torch",
    "compile",
    "constrain",
    "control_flow",
    "data_parallel",
    "deferred_init",
    "extract_all_buffers",
    "extract_jax",
    "fori_loop",
    "fsdp",
    "gradient_checkpoint",
    "j2t_autograd",
    "jax_jit",
    "jax_shard_map",
    "jax_value_and_grad",
    "jax_view",
    "jax_vmap",
    "load_checkpoint",
    "make_mesh",
    "open_checkpoint",
    "register_jax",
    "save_checkpoint",
    "scan",
    "scan_layers",
    "shard_batch",
    "shard_map",
    "shard_module",
    "shard_optimizer",
    "t2j_autograd",
    "tensor_parallel",
    "torch_view",
]

jax_shard_map = shard_map
