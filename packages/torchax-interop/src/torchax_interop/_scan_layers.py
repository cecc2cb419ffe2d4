"""`scan_layers`: identical layers, one after the other, as one `lax.scan`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.func import functional_call
from torchax.tensor import Tensor

from ._operands import tracing
from ._tree import flatten
from .compile import Compiled
from .control_flow import scan_over

_PLAIN = (int, float, str, bool, type(None), tuple)


def scan_layers(
    layers: Iterable[torch.nn.Module],
    *,
    remat: bool | Callable[..., Any] = False,
    unroll: int = 1,
    ignore: Sequence[str] = ("layer_idx",),
) -> ScannedLayers:
    """Identical layers as one module that runs them as one `lax.scan`: compiling takes as long as for one layer.

    ``model.layers = scan_layers(model.layers)`` is all there is to do where the model says
    ``for layer in self.layers: x = layer(x, ...)``: the loop then runs once, and runs all layers. `state_dict` and
    `load_state_dict` know the layers one by one (``layers.0.weight``), as before; `parameters` has one parameter for all
    layers, of shape ``(len(layers), ...)``. Make the optimizer afterwards.

    Args:
        layers: modules of one class, with parameters and buffers of the same names, shapes and dtypes. They are copied.
        remat: keep only the input of every layer for the backward, and compute the rest again. A policy of
            `jax.checkpoint_policies` says what is kept besides.
        unroll: how many layers one turn of the loop runs, see `jax.lax.scan`.
        ignore: plain attributes that may differ from layer to layer; all layers then see the first one's.

    Raises:
        ValueError: the layers are not identical; says where.
    """
    layers = list(layers)
    if not layers or not all(isinstance(m, torch.nn.Module) for m in layers):
        raise ValueError(f"scan_layers takes modules, at least one; got {[type(m).__name__ for m in layers]}")
    for i, other in enumerate(layers[1:], 1):
        if difference := _difference(layers[0], other, frozenset(ignore)):
            raise ValueError(f"scan_layers takes identical layers, but layer {i} is not as layer 0: {difference}")
    return ScannedLayers(layers, remat, unroll)


class ScannedLayers(torch.nn.Module):
    """What `scan_layers` gives. Its call takes and gives what a layer takes and gives, the first argument being handed on.

    Attributes:
        stack: a layer whose parameters and buffers are those of all layers, stacked along dimension 0.
    """

    def __init__(self, layers: list[torch.nn.Module], remat: Any, unroll: int):
        super().__init__()
        self.stack = copy.deepcopy(layers[0])
        self.length, self.remat, self.unroll = len(layers), remat, unroll
        self.training = layers[0].training
        modules = [dict(m.named_modules()) for m in layers]
        with torch.no_grad():
            for name, module in self.stack.named_modules():
                for key, p in module._parameters.items():
                    if p is not None:
                        stacked = torch.stack([m[name]._parameters[key].detach() for m in modules])  # type: ignore[union-attr]
                        module._parameters[key] = torch.nn.Parameter(stacked, p.requires_grad)
                for key, b in module._buffers.items():
                    if b is not None:
                        module._buffers[key] = torch.stack([m[name]._buffers[key] for m in modules])  # type: ignore[misc]
        self._keep_ties(layers[0])
        self._register_state_dict_hook(_unstack)
        self._register_load_state_dict_pre_hook(self._restack)

    def _keep_ties(self, layer: torch.nn.Module) -> None:
        """A parameter that has several names in a layer has them in the stack."""
        first: dict[int, torch.nn.Parameter] = {}
        twins = dict(self.stack.named_modules())
        for name, module in layer.named_modules():
            for key, p in module._parameters.items():
                if p is not None:
                    stacked = twins[name]._parameters[key]
                    twins[name]._parameters[key] = first.setdefault(id(p), stacked)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ calls
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """All layers: ``x = layer(x, *args, **kwargs)`` for each."""
        objects: list[Any] = []
        leaves: list[Any] = []
        flatten((x, args, kwargs), leaves, None, objects)
        if objects:
            raise TypeError(
                f"scan_layers cannot hand a {type(objects[0]).__name__} to its layers: all of them would use the first one's "
                "part of it. Call the model with use_cache=False"
            )
        params, buffers = dict(self.stack.named_parameters()), dict(self.stack.named_buffers())
        tensors = [t for t in (*leaves, *params.values()) if isinstance(t, torch.Tensor)]
        if not any(type(t) is Tensor for t in tensors):
            return self._loop(params, buffers, x, args, kwargs)
        if tracing(*tensors):
            return self._scan(x, args, kwargs)
        program = self.__dict__.get("_program")
        if program is None:
            program = self.__dict__["_program"] = Compiled(self._scan)
        return program(x, args, kwargs)

    def _scan(self, x: Any, args: Any, kwargs: Any) -> Any:
        params, buffers = dict(self.stack.named_parameters()), dict(self.stack.named_buffers())

        def layer(x: Any, own: Any, args: Any, kwargs: Any) -> Any:
            params, buffers = own
            before = {name: b._s.value for name, b in buffers.items()}
            x = functional_call(self.stack, {**params, **buffers}, (x, *args), kwargs)
            return x, {name: b for name, b in buffers.items() if b._s.value is not before[name]}

        x, written = scan_over(
            layer, x, (params, buffers), (args, kwargs), remat=self.remat, unroll=self.unroll, name="scan_layers"
        )
        with torch.no_grad():
            for name, b in written.items():
                buffers[name].copy_(b)
        return x

    def _loop(self, params: Any, buffers: Any, x: Any, args: Any, kwargs: Any) -> Any:
        """On other devices."""
        for i in range(self.length):
            own = {name: t[i] for name, t in (*params.items(), *buffers.items())}
            x = functional_call(self.stack, own, (x, *args), kwargs)
        return x

    # ------------------------------------------------------------------ as a list of layers
    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[torch.nn.Module]:
        """Once: this module, which runs all layers."""
        yield self

    def __getitem__(self, index: Any) -> Any:
        """A layer, with parameters that share memory with the stack; a slice that has all layers gives this module.

        Raises:
            IndexError: no such layer.
            ValueError: a slice that leaves layers out.
        """
        if isinstance(index, slice):
            if list(range(self.length))[index] == list(range(self.length)):
                return self
            raise ValueError(f"scan_layers runs all {self.length} layers; [{index.start}:{index.stop}] leaves some out")
        if not -self.length <= index < self.length:
            raise IndexError(f"there are {self.length} layers; got {index}")
        return self._layer(index % self.length)

    def _layer(self, i: int) -> torch.nn.Module:
        memo = {id(t): None for t in (*self.stack.parameters(), *self.stack.buffers())}
        shells = {key: torch.nn.Parameter(torch.empty(0), False) for key in memo}
        layer = copy.deepcopy(self.stack, shells)  # type: ignore[arg-type]
        twins = dict(self.stack.named_modules())
        for name, module in layer.named_modules():
            for key, p in twins[name]._parameters.items():
                if p is not None:
                    module._parameters[key] = torch.nn.Parameter(p.detach()[i], p.requires_grad)
            for key, b in twins[name]._buffers.items():
                if b is not None:
                    module._buffers[key] = b[i]
        return layer

    def extra_repr(self) -> str:
        return f"{self.length} layers"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_program"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._load_state_dict_pre_hooks.clear()  # the copy's hook is a method of the copy
        self._register_load_state_dict_pre_hook(self._restack)

    # ------------------------------------------------------------------ checkpoints
    def _restack(
        self,
        state: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: Any,
        errors: list[str],
    ) -> None:
        """The layers' entries become those of the stack; what is missing or does not fit is said in the layers' names."""
        own = {**dict(self.stack.named_parameters(remove_duplicate=False)), **_saved_buffers(self.stack)}
        for name, current in own.items():
            found = [state.pop(f"{prefix}{i}.{name}", None) for i in range(self.length)]
            if all(t is None for t in found) and f"{prefix}stack.{name}" in state:
                continue  # saved by something that knows no hooks
            device = next((t.device for t in found if t is not None), current.device)
            for i, t in enumerate(found):
                want = tuple(current.shape[1:])
                if t is None:
                    missing.append(f"{prefix}{i}.{name}")
                elif tuple(t.shape) != want:
                    errors.append(
                        f"size mismatch for {prefix}{i}.{name}: copying a param with shape {tuple(t.shape)} from checkpoint, "
                        f"the shape in current model is {want}."
                    )
                else:
                    continue
                found[i] = current.detach()[i].to(device)
            with torch.no_grad():
                state[f"{prefix}stack.{name}"] = torch.stack(found)


def _unstack(module: ScannedLayers, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The stack's entries become those of the layers, which share memory with it."""
    start = f"{prefix}stack."
    stacked = {k.removeprefix(start): state.pop(k) for k in [k for k in state if k.startswith(start)]}
    for i in range(module.length):
        for name, t in stacked.items():
            state[f"{prefix}{i}.{name}"] = t[i] if isinstance(t, torch.Tensor) else t


def _saved_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for prefix, m in module.named_modules():
        for key, b in m._buffers.items():
            if b is not None and key not in m._non_persistent_buffers_set:
                found[f"{prefix}.{key}" if prefix else key] = b
    return found


def _difference(a: torch.nn.Module, b: torch.nn.Module, ignore: frozenset[str]) -> str | None:
    """Where two layers are not identical, in words."""
    ours, theirs = dict(a.named_modules()), dict(b.named_modules())
    if list(ours) != list(theirs):
        return f"its modules are {list(theirs)}, not {list(ours)}"
    for name, m in ours.items():
        n, where = theirs[name], f"{name or 'the layer'}"
        if type(m) is not type(n):
            return f"{where} is a {type(n).__name__}, not a {type(m).__name__}"
        for kind in ("_parameters", "_buffers"):
            p, q = getattr(m, kind), getattr(n, kind)
            facts = lambda table: {
                k: None if t is None else (tuple(t.shape), t.dtype, t.device, t.requires_grad) for k, t in table.items()
            }
            if facts(p) != facts(q):
                return f"{where} has the {kind[1:]} {facts(q)}, not {facts(p)}"
        for key, value in vars(m).items():
            if key.startswith("_") or key in ignore:
                continue
            if isinstance(value, torch.Tensor):
                return f"{where}.{key} is a tensor that is no parameter or buffer; register it as one"
            if isinstance(value, _PLAIN) and vars(n).get(key) != value:
                return f"{where}.{key} is {vars(n).get(key)!r}, not {value!r}"
    return None


__all__ = ["ScannedLayers", "scan_layers"]
