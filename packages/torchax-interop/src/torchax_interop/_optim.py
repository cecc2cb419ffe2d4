"""Optimizers of `torch.optim` inside a recording: hyperparameters become inputs, step counters live on the device.

`torch.optim` keeps step counters on CPU and hyperparameters as Python numbers; both would be frozen into the program.
So around each recorded `step()` the groups are made capturable with a tensor as `lr` and symbols (see `_symbolic`) in place of
other floats, and what the user sees is put back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torchax._execute._where import user_line
from torchax._storage import Storage, dense_meta
from torchax.tensor import Tensor, make

from ._recording import Recording, concrete, current, outside
from ._symbolic import Setting, setting_of, symbolic


class _Active:
    """What is put back after a recorded step."""

    def __init__(self) -> None:
        self.groups: list[tuple[dict[str, Any], str, Any, Any]] = []
        self.steps: list[tuple[dict[str, Any], Tensor]] = []
        self.compiling = False


_active: dict[int, _Active] = {}


def _before(optimizer: Any, args: Any, kwargs: Any) -> None:
    recording = current()
    if recording is None:
        return
    active = _active[id(optimizer)] = _Active()
    recording.undo.append(lambda: _put_back(optimizer))
    first = id(optimizer) not in recording.optimizers
    if first:
        recording.undo.append(_forget_new_state(optimizer))
        # counters that an optimizer keeps as Python numbers: constants of the program
        recording.settings += [
            (values, k, v) for values in optimizer.state.values() for k, v in values.items() if type(v) in (int, float)
        ]
    recording.optimizers.setdefault(id(optimizer), (optimizer, optimizer.state, optimizer.param_groups))
    for group in optimizer.param_groups:
        if not any(type(p) is Tensor for p in group["params"]):
            continue
        _numbers_to_device(recording, active, optimizer, group, first)
        if "capturable" in group:
            _swap(active, group, "capturable", True)
        if group.get("foreach") is False and not group.get("differentiable"):
            _swap(active, group, "foreach", True)  # the loop takes lr as a Python number only; the numbers are the same
        _counters_to_device(recording, active, optimizer, group)
    active.compiling = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True


def _after(optimizer: Any, args: Any, kwargs: Any) -> None:
    if id(optimizer) in _active:
        for state, counter in _active[id(optimizer)].steps:
            with torch.no_grad():
                counter.copy_(state["step"])
        _put_back(optimizer)
        for values in optimizer.state.values():
            for name, value in values.items():
                if type(value) is torch.SymFloat:  # a symbol means nothing after the recording
                    values[name] = float(value)


def _put_back(optimizer: Any) -> None:
    active = _active.pop(id(optimizer), None)
    if active is None:
        return
    torch.compiler._is_compiling_flag = active.compiling
    for group, name, value, put in reversed(active.groups):
        if group.get(name) is put:  # else a hook has set it
            group[name] = value
    for state, counter in active.steps:
        state["step"] = counter


def _forget_new_state(optimizer: Any) -> Any:
    before = {p: dict(values) for p, values in optimizer.state.items()}

    def restore() -> None:
        for p in list(optimizer.state):
            if p not in before:
                del optimizer.state[p]
            else:
                optimizer.state[p].clear()
                optimizer.state[p].update(before[p])

    return restore


def _swap(active: _Active, group: dict[str, Any], name: str, value: Any) -> None:
    active.groups.append((group, name, group[name], value))
    group[name] = value


def _numbers_to_device(
    recording: Recording, active: _Active, optimizer: Any, group: dict[str, Any], first: bool
) -> None:
    """Hyperparameters become inputs where they can, the others are constants of the program."""
    before = recording.groups.get(id(group))
    by_torch = type(optimizer).step.__module__.startswith("torch.optim.")  # which takes symbols for numbers
    rate_as_tensor = "foreach" in group or not by_torch  # without (Muon's), torch takes a number only
    for name, value in list(group.items()):
        if name == "params" or type(value) is Tensor:
            continue
        setting = _known(recording, group, name)
        as_tensor = name == "lr" and rate_as_tensor
        as_before = as_tensor if before is None else before.get(name) is value  # else the function has set it
        if setting is None and as_before:
            if as_tensor:
                storage = Storage(concrete(float(value)), dense_meta((), torch.float64))
                setting = Setting(group, name, {None: storage})
            elif by_torch:
                setting = setting_of(group, name)
            if setting is not None:
                recording.numbers.append(setting)
        if setting is None:
            if first and not isinstance(value, torch.Tensor):
                recording.settings.append((group, name, value))
        elif setting.recorded is value:  # else it was set between two steps: a constant
            storage = setting.parts[None] if as_tensor else None
            stand_in = symbolic(setting, recording.checks) if storage is None else make(storage, storage.geometry)
            _swap(active, group, name, stand_in)


def groups_before(optimizers: list[Any]) -> dict[int, dict[str, Any]]:
    """The entries of their groups before a recording (by id of the group); what the function sets is told apart by identity."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update({k: v * 1.0 for k, v in group.items() if type(v) is float})  # objects that nobody else has
            group.update({k: tuple(list(v)) for k, v in group.items() if type(v) is tuple})
    return {id(group): dict(group) for o in optimizers for group in o.param_groups}


def _known(recording: Recording, group: dict[str, Any], name: str) -> Setting | None:
    return next((s for s in recording.numbers if s.group is group and s.name == name), None)


def _counters_to_device(recording: Recording, active: _Active, optimizer: Any, group: dict[str, Any]) -> None:
    for p in group["params"]:
        if p not in optimizer.state or type(p) is not Tensor:
            continue
        state = optimizer.state[p]
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and type(value) is not Tensor and value.dim() == 0:
                _move(recording, state, name, value, p.device)
        counter = state.get("step")
        if type(counter) is Tensor and counter.dtype is torch.float32:
            # 1 - beta**step loses digits in float32, which torch's own path on Python numbers does not
            active.steps.append((state, counter))
            state["step"] = counter.to(torch.float64)


def _move(recording: Recording, state: dict[str, Any], name: str, value: torch.Tensor, device: torch.device) -> None:
    with outside():
        state[name] = value.to(device)
    recording.undo.append(lambda: state.__setitem__(name, value))


# ---------------------------------------------------------------------- schedulers
def refuse_schedulers() -> None:
    """From now on, a scheduler that steps while something is recorded says that it belongs outside."""
    kinds: list[Any] = [torch.optim.lr_scheduler.LRScheduler]
    for kind in kinds:
        kinds += kind.__subclasses__()
        step = kind.__dict__.get("step")
        if step is not None and not hasattr(step, "__torchax__"):
            kind.step = _refusing(step)


def _refusing(step: Any) -> Any:
    @functools.wraps(step)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if current() is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step() is called inside of a compiled function{user_line()}: it changes Python numbers, "
                "which a program cannot do again at every call. Call it outside, after the compiled function; the learning rate "
                "is an input of the program, so nothing is compiled again"
            )
        return step(self, *args, **kwargs)

    call.__torchax__ = step  # type: ignore[attr-defined]
    return call


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)
