"""Models on several devices: parameters laid out by rules, batches divided, models that are born divided."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax import convert
from torchax._execute import Program, state
from torchax._sharding import divide_batch, place
from torchax._storage import dense_meta
from torchax.tensor import Tensor, wrap

from ._groups import dense
from ._mesh import as_mesh, checked_sharding, size_of
from ._tree import tree_map
from .compile import Compiled
from .rules import Entry, Rules, as_rules, entries_of

Plan = list[tuple[Entry, NamedSharding]]


def plan(model: torch.nn.Module, mesh: Mesh, rules: Rules) -> tuple[Plan, tuple[str, ...]]:
    """Where each parameter and buffer would lie, and the axes of the batch; nothing is changed.

    Raises:
        ValueError: rules and model, or rules and mesh, do not fit.
    """
    entries, batch = entries_of(model), ()
    for rule in as_rules(rules):
        rule.assign(entries, mesh)
        batch += tuple(a for a in rule.batch if a not in batch)
    if unknown := [a for a in batch if a not in mesh.shape]:
        raise ValueError(f"the batch is to be divided over mesh axes {unknown}; the mesh has {dict(mesh.shape)}")
    return [(e, checked_sharding(mesh, e.spec, e.tensor.shape, f"parameter {e.names[0]!r}")) for e in entries], batch


# ---------------------------------------------------------------------- models
def shard_module(
    model: torch.nn.Module, mesh: Any, rules: Rules, *, optimizer: torch.optim.Optimizer | None = None
) -> torch.nn.Module:
    """Lay a model out over a mesh, in place. It is then used and trained as before, eagerly or compiled.

    Parameters and buffers that are on CPU are moved straight to where they belong. Gradients lie as their parameters do, and so
    does the state that an optimizer makes. Where rules divide the batch (`fsdp`, `data_parallel`), results of the layers are
    kept divided by their first dimension.

    Args:
        model: on CPU or on device jax.
        mesh: a `jax.sharding.Mesh` (`make_mesh`), or one of torch's.
        rules: a rule (`fsdp`, `tensor_parallel`, `data_parallel`), a list of rules and of pairs (pattern, partition spec), which
            complement each other from left to right, or a dict of such pairs. What no rule is about is replicated.
        optimizer: one whose state exists already.

    Returns:
        The model.

    Raises:
        ValueError: a rule matches nothing, or the mesh does not divide a dimension. The model is as it was.
    """
    mesh = as_mesh(mesh)
    found, batch = plan(model, mesh, rules)
    for entry, _ in found:
        if entry.tensor.device.type == "meta":
            raise ValueError(
                f"parameter {entry.names[0]!r} is on device meta and has no values; use deferred_init(factory, mesh, rules), or "
                "load a checkpoint"
            )
        if type(entry.tensor) is Tensor and entry.tensor._v is not None:
            raise ValueError(
                f"parameter {entry.names[0]!r} is a view of another tensor; replace it by a copy (.clone())"
            )
    targets = {id(e.tensor): sharding for e, sharding in found}
    names = [(e.owner, e.leaf, sharding) for e, sharding in found]
    if any(type(e.tensor) is not Tensor for e, _ in found):
        model._apply(lambda t: t if type(t) is Tensor else _to_sharding(t, targets.get(id(t))))
    for owner, leaf, sharding in names:
        tensor: Any = owner._parameters.get(leaf) if leaf in owner._parameters else owner._buffers[leaf]
        tensor.shard_(sharding)
        if isinstance(tensor, torch.nn.Parameter):
            if type(tensor.grad) is Tensor:
                tensor.grad.shard_(sharding)
            _hook_gradient(tensor)
    if optimizer is not None:
        shard_optimizer(optimizer)
    _hook_modules(model, mesh, batch)
    if batch or len(mesh.axis_names) == 1:
        divide_batch(mesh, batch)
    return model


def shard_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Lay the state that an optimizer holds for each parameter out as the parameter is."""
    for p, values in optimizer.state.items():
        if type(p) is not Tensor or p._s.sharding is None:
            continue
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                if type(value) is Tensor:
                    value.shard_(p._s.sharding)
                else:
                    values[name] = _to_sharding(value, p._s.sharding)


def _to_sharding(t: torch.Tensor, sharding: Any) -> torch.Tensor:
    """A CPU tensor as one on the devices of `sharding`; each part goes to its device only."""
    if sharding is None:
        return t.to("jax")
    moved = wrap(place(convert.host_values(t), sharding), dense_meta(tuple(t.shape), t.dtype))
    moved._s.sharding = sharding
    return moved


def deferred_init(factory: Callable[[], torch.nn.Module], mesh: Any, rules: Rules) -> torch.nn.Module:
    """Make a model that is laid out over a mesh from the beginning, for models larger than one device or the host.

    The factory is recorded: it allocates nothing. Its random numbers and formulas become one XLA program whose results are
    born on their devices. The values are those that the factory would give on device jax after the same seed.

    Args:
        factory: makes the model, ``lambda: LlamaForCausalLM(config)``; it names no device.
        mesh: as for `shard_module`.
        rules: as for `shard_module`.

    Returns:
        The model, on device jax.

    Raises:
        ValueError: as `shard_module`, or the factory chose device meta.
        TracerEscaped: the factory asks for values (``.item()``) of tensors that it made.
    """
    mesh = as_mesh(mesh)

    def build() -> torch.nn.Module:
        model = factory()
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"deferred_init takes a function that makes a torch.nn.Module; it gave {type(model).__name__}"
            )
        for entry, sharding in plan(model, mesh, rules)[0]:
            tensor = entry.tensor
            if tensor.device.type == "meta":
                raise ValueError(f"the factory made parameter {entry.names[0]!r} on device meta; let it name no device")
            if type(tensor) is Tensor and tensor._s.owner is state.executor.owner:
                if not isinstance(tensor._s.value, jax.core.Tracer):  # torch.empty, never written
                    tensor._s.value = jnp.zeros(tensor._m.shape, tensor._m.jax_dtype)
                tensor._s.sharding = sharding
        return model

    return shard_module(Compiled(build)(), mesh, rules)


# ---------------------------------------------------------------------- batches
def shard_batch(batch: Any, mesh: Any, axis: Any = "data", *, dim: int = 0) -> Any:
    """A nest of tensors divided over a mesh axis, CPU tensors straight from the host.

    Args:
        batch: a nest; tensors of CPU or of device jax. What is no tensor, or 0-d, is given back or replicated.
        mesh: as for `shard_module`.
        axis: a mesh axis, or a tuple of them.
        dim: the dimension that is divided.

    Raises:
        ValueError: the axis does not divide the batch evenly.
    """
    mesh = as_mesh(mesh)

    def put(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        spec: list[Any] = [None] * x.dim()
        if x.dim():
            spec[dim] = axis
        sharding = checked_sharding(mesh, spec, x.shape, "a tensor of the batch")
        if type(x) is Tensor:
            return constrain(x, sharding)
        return _to_sharding(x, sharding).requires_grad_(x.requires_grad)

    placed = tree_map(put, batch)
    if dim == 0:
        divide_batch(mesh, axis if isinstance(axis, tuple) else (axis,))
    return placed


# ---------------------------------------------------------------------- constraints inside of functions
class _Constrained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sharding: Any) -> Tensor:  # type: ignore[override]
        ctx.sharding = sharding
        return _constrained(x, sharding)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        return constrain(grad, ctx.sharding), None


def constrain(tensor: torch.Tensor, sharding: Any) -> torch.Tensor:
    """The same values laid out as `sharding` says; so is the gradient. Works eagerly and while tracing.

    Args:
        tensor: on device jax.
        sharding: a `jax.sharding.NamedSharding`; entries may be ``PartitionSpec.UNCONSTRAINED``.
    """
    if type(tensor) is not Tensor:
        return tensor  # inside of torch.func transforms: XLA decides
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Constrained.apply(tensor, sharding)  # type: ignore[return-value]
    return _constrained(tensor, sharding)


def _constrained(x: Tensor, sharding: Any) -> Tensor:
    return wrap(state.executor.run(_program(sharding), (x,)), dense(x._m))


@functools.lru_cache(maxsize=1024)
def _program(sharding: Any) -> Program:
    def fn(x: Any) -> Any:
        if jax.sharding.get_abstract_mesh().manual_axes:  # inside of shard_map each device works on its own part
            return x
        return jax.lax.with_sharding_constraint(x, sharding)

    return Program(fn, "torchax::constrain")


class _GradientHook:
    """Gives a gradient the layout of its parameter."""

    def __init__(self, parameter: Tensor):
        self.sharding = lambda: parameter._s.sharding

    def __call__(self, grad: Any) -> Any:
        sharding = self.sharding()
        return grad if sharding is None or type(grad) is not Tensor else constrain(grad, sharding)


def _hook_gradient(p: Any) -> None:
    if p.requires_grad and not any(isinstance(h, _GradientHook) for h in (p._backward_hooks or {}).values()):
        p.register_hook(_GradientHook(p))


class _BatchHook:
    """Keeps results of a layer divided by their first dimension."""

    def __init__(self, mesh: Mesh | None, axes: tuple[str, ...]):
        self.mesh, self.axes = mesh, axes

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        if type(output) is Tensor:
            return self.constrained(output)
        if type(output) is tuple:
            return tuple([self.constrained(x) if type(x) is Tensor else x for x in output])
        return None

    def constrained(self, x: Tensor) -> torch.Tensor:
        """`x`, divided where the axes divide it evenly."""
        if self.mesh is None or not x.dim() or x.shape[0] % size_of(self.mesh, self.axes):
            return x
        entry = self.axes[0] if len(self.axes) == 1 else self.axes
        spec = PartitionSpec(entry, *[PartitionSpec.UNCONSTRAINED] * (x.dim() - 1))
        return constrain(x, NamedSharding(self.mesh, spec))

    def __deepcopy__(self, memo: Any) -> _BatchHook:
        return _BatchHook(self.mesh, self.axes)

    def __reduce__(self) -> Any:
        return _BatchHook, (None, ())  # devices cannot be saved


@contextlib.contextmanager
def laid_out_modules(modules: list[torch.nn.Module], mesh: Mesh, axes: tuple[str, ...]) -> Iterator[None]:
    """Within, gradients lie as their parameters do, and results of layers as `axes` divide the batch."""
    hooks = [{m: OrderedDict(m._forward_hooks) for m in module.modules()} for module in modules]
    handles = []
    try:
        for module in modules:
            parameters: Any = module.parameters()
            handles += [p.register_hook(_GradientHook(p)) for p in parameters if p.requires_grad]
            _hook_modules(module, mesh, axes)
        if axes or len(mesh.axis_names) == 1:
            divide_batch(mesh, axes)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for known in hooks:
            for m, before in known.items():
                m._forward_hooks = before


def _hook_modules(model: torch.nn.Module, mesh: Mesh, axes: tuple[str, ...]) -> None:
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, _BatchHook)]:
            del module._forward_hooks[key]
        if axes and any(p is not None for p in module._parameters.values()):
            module.register_forward_hook(_BatchHook(mesh, axes))


def bytes_per_device(x: Any) -> dict[Any, int]:
    """Bytes that each device of this process holds of a module's parameters and buffers, of an optimizer's state, or of a nest of tensors."""
    if isinstance(x, torch.nn.Module):
        x = [e.tensor for e in entries_of(x)]
    elif isinstance(x, torch.optim.Optimizer):
        x = [list(values.values()) for values in x.state.values()]
    found: dict[Any, int] = {}

    def add(t: Any) -> None:
        if type(t) is Tensor and not isinstance(value := t.jax(), np.ndarray):
            for shard in value.addressable_shards:
                found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes

    tree_map(add, x)
    return found


__all__ = ["bytes_per_device", "constrain", "deferred_init", "shard_batch", "shard_module", "shard_optimizer"]
