"""The bridge between PyTorch and JAX: compile, views, gradients across, modules taken apart, checkpoints.

Everything here is also found as ``torchax.interop.NAME``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import control_flow, flex
from ._mesh import make_mesh
from ._scan_layers import ScannedLayers, scan_layers
from .aot import AotCompiled, aot_compile
from .autograd import j2t_autograd
from .checkpoint import CheckpointManager, load_checkpoint, open_checkpoint, save_checkpoint
from .compile import Compiled, CompileOptions, compile
from .custom_ops import register_jax
from .jit import JittableModule, extract_all_buffers, extract_jax, jax_jit
from .loops import fori_loop, scan
from .modules import JaxModule
from .optimizer import OptaxOptimizer
from .rules import Rule, by_name, data_parallel, fsdp, tensor_parallel
from .sharding import bytes_per_device, constrain, deferred_init, shard_batch, shard_module, shard_optimizer
from .transforms import gradient_checkpoint, jax_value_and_grad, jax_vmap, t2j_autograd
from .views import call_jax, call_torch, jax_view, shard_map, torch_view

if TYPE_CHECKING:
    from .mesh_util import Mesh
    from .placements import (
        DeviceMesh,
        Partial,
        Replicate,
        Shard,
        device_mesh_of,
        distribute_module,
        distribute_tensor,
        full_tensor,
        init_device_mesh,
        placements_of,
        redistribute,
    )

__version__ = "0.1.0"

__all__ = [
    "AotCompiled",
    "CheckpointManager",
    "CompileOptions",
    "Compiled",
    "DeviceMesh",
    "JaxModule",
    "JittableModule",
    "Mesh",
    "OptaxOptimizer",
    "Partial",
    "Replicate",
    "Rule",
    "ScannedLayers",
    "Shard",
    "aot_compile",
    "by_name",
    "bytes_per_device",
    "call_jax",
    "call_torch",
    "compile",
    "constrain",
    "control_flow",
    "data_parallel",
    "deferred_init",
    "device_mesh_of",
    "distribute_module",
    "distribute_tensor",
    "extract_all_buffers",
    "extract_jax",
    "flex",
    "fori_loop",
    "fsdp",
    "full_tensor",
    "gradient_checkpoint",
    "init_device_mesh",
    "j2t_autograd",
    "jax_jit",
    "jax_shard_map",
    "jax_value_and_grad",
    "jax_view",
    "jax_vmap",
    "load_checkpoint",
    "make_mesh",
    "open_checkpoint",
    "placements_of",
    "redistribute",
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

_PLACEMENTS = frozenset(
    {
        "DeviceMesh",
        "Partial",
        "Replicate",
        "Shard",
        "device_mesh_of",
        "distribute_module",
        "distribute_tensor",
        "full_tensor",
        "init_device_mesh",
        "placements_of",
        "redistribute",
    }
)


def __getattr__(name: str) -> Any:
    if name in _PLACEMENTS:  # torch.distributed.tensor takes most of a second to import
        return getattr(importlib.import_module("torchax_interop.placements"), name)
    if name == "Mesh":
        return importlib.import_module("torchax_interop.mesh_util").Mesh
    raise AttributeError(f"module 'torchax_interop' has no attribute {name!r}")
