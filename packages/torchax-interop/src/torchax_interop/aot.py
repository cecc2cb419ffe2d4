"""Programs compiled ahead of time for TPUs that are not here: whether they fit, and what they would do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import torch
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax import convert
from torchax.tensor import Tensor

from ._abstract import Abstracted, abstract_tensor, abstracted, bytes_on_a_device
from ._chips import chip_of
from ._fit import AotCompiled, largest_values, measured, refused
from ._groups import Options
from ._mesh import checked_sharding, make_mesh
from ._program import Program
from ._reach import reachable_owners
from ._recorder import record
from ._tree import flatten
from .rules import Rules, data_parallel


def aot_compile(
    fn_or_module: Callable[..., Any] | torch.nn.Module,
    example_args: tuple[Any, ...] | list[Any],
    topology: str = "v5e:2x2",
    *,
    mesh: Mapping[str, int] | None = None,
    shardings: Rules | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> AotCompiled:
    """Compile a train or inference step with the real TPU compiler, for TPUs that are not here.

    Nothing is allocated or computed: parameters, buffers, the state of optimizers and the arguments count with their shapes, so
    models may be on device ``meta``. A step that makes its optimizer's state in its first call is compiled as it runs from
    the second call on. Models and optimizers are found as `torchax.compile` finds them, in what the function closes over, and are
    afterwards as they were.

    Args:
        fn_or_module: a function as `torchax.compile` takes it, or a module, which is compiled for inference (without gradients).
        example_args: its positional arguments; tensors, on any device, count with shape and dtype, the rest is static.
        topology: generation and arrangement of chips: ``"v5e:2x2"``, ``"v5e:4x8"``, ``"v4:2x2x1"``, ``"v5p:2x2x2"``, ``"v6e:2x4"``.
        mesh: sizes of named axes, ``{"data": 4, "model": 2}``; one may be -1. Default: one axis, ``data``, over all chips; fewer than all
            chips are taken in their order.
        shardings: rules as for `shard_module`. Default: parameters on every chip, the batch divided over the first axis.
            Tensors among the arguments are divided in dimension 0 over the axes that the rules name for the batch.
        compiler_options: for XLA.

    Returns:
        What the compiler says; `AotCompiled.fits` is False where the program needs more memory than a chip has.

    Raises:
        ImportError: ``libtpu`` is not installed.
        ValueError: there is no such topology, or mesh, rules and shapes do not fit each other.
        TracerEscaped: as for `torchax.compile`.
    """
    if not callable(fn_or_module):
        raise TypeError(f"aot_compile takes a function or a module; got {type(fn_or_module).__name__}")
    if not isinstance(example_args, tuple | list):
        raise TypeError(
            f"aot_compile takes the example arguments as a tuple; got {type(example_args).__name__}: write (x,) for one"
        )
    chip, devices = chip_of(topology), _devices(topology)
    grid = make_mesh(devices, **(mesh or {"data": len(devices)}))
    rules = data_parallel(grid.axis_names[0]) if shardings is None else shardings
    modules, optimizers = reachable_owners(fn_or_module)
    inference = isinstance(fn_or_module, torch.nn.Module)
    with abstracted(modules, optimizers, grid, rules) as state, _target(inference, grid):
        lowered, jaxpr, held = _lowered(fn_or_module, tuple(example_args), grid, state)
        try:
            with _without_cache():
                program = lowered.compile(compiler_options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return refused(str(error), topology, chip, grid, state.bytes_per_device, largest_values(jaxpr))
        return measured(program, topology, chip, grid, state.bytes_per_device, held)


def _lowered(
    fn: Callable[..., Any], args: tuple[Any, ...], mesh: Mesh, state: Abstracted
) -> tuple[jax.stages.Lowered, Any, int]:
    """The program, its jaxpr, and the bytes of the state that it does not read."""
    leaves: list[Any] = []
    spec = flatten((args, {}), leaves)
    leaves = [_argument(x, mesh, state.batch) if isinstance(x, torch.Tensor) else x for x in leaves]

    def rehearsed() -> Program:
        return record(fn, leaves, spec, Options(), [], Program.rehearse, state.storages)[0]

    program = rehearsed()
    if program.survivors:  # gradients, an optimizer's state: from the second call on they are inputs
        state.storages += [s for s in program.survivors if s not in state.storages]
        first, program = program, rehearsed()
        replaced = {g._s for t, g in first.set_grads if type(g) is Tensor and t.grad is not g}
        state.storages = [s for s in (*state.storages, *program.survivors) if s not in replaced]
    lowered, jaxpr, read = program.lower_for(leaves, "tpu", NamedSharding(mesh, PartitionSpec()))
    return lowered, jaxpr, sum(bytes_on_a_device(s.value) for s in state.storages if s not in read)


def _argument(x: torch.Tensor, mesh: Mesh, batch: tuple[str, ...]) -> Tensor:
    spec = (batch,) if x.dim() and batch else ()
    what = "a tensor among the arguments"
    return abstract_tensor(x, checked_sharding(mesh, spec, x.shape, what))


@contextlib.contextmanager
def _target(inference: bool, mesh: Mesh) -> Iterator[None]:
    with (
        convert.compiling_for("tpu"),
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),  # kernels ask it for the kind of the device
        torch.set_grad_enabled(torch.is_grad_enabled() and not inference),
    ):
        yield


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Within, JAX's cache of compiled programs is not asked: it cannot read programs for devices that are not here."""
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the setting once
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _devices(topology: str) -> list[Any]:
    """The chips of a topology, as the compiler describes them."""
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            "to compile for a TPU that is not here, install its compiler: pip install 'torchax[tpu-aot]' (Linux)"
        ) from None
    from jax.experimental import topologies

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"there is no TPU topology {topology!r}; write e.g. 'v5e:2x2', 'v5e:4x8', 'v4:2x2x1', 'v5p:2x2x2', 'v6e:2x4' ({why})"
        ) from None


# so that the compiler looks for no TPU, shares the machine with others of its kind, and writes no logs
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}

__all__ = ["AotCompiled", "aot_compile"]
