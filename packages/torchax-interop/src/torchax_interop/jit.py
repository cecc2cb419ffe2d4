"""`jax_jit`, `JittableModule` and the ways to take a module apart into states and functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax import random as _random

from ._enter import enter, to_array
from .compile import Compiled, CompileOptions

States = dict[str, torch.Tensor]


def jax_jit(
    fn: Callable[..., Any] | None = None, kwargs_for_jax_jit: dict[str, Any] | None = None, **options: Any
) -> Any:
    """`jax.jit` of a function over nests of tensors.

    It is `torchax.compile` with `jax.jit`'s options: tensors that the function writes or draws from without being given
    them are kept up to date.

    Args:
        fn: takes and gives nests of tensors; None gives a decorator.
        kwargs_for_jax_jit: ``static_argnums``, ``static_argnames``, ``donate_argnums``, ``donate_argnames``,
            ``in_shardings``, ``out_shardings``, ``compiler_options``, in terms of the function's arguments.
        options: the same as keywords.
    """
    chosen = {**(kwargs_for_jax_jit or {}), **{k: v for k, v in options.items() if k != "fix_for_buffer_donation"}}
    if fn is None:
        return lambda f: jax_jit(f, chosen)
    return Compiled(fn, **chosen)


def extract_all_buffers(module: torch.nn.Module) -> tuple[States, States]:
    """``(parameters, buffers)`` of a module, by qualified name; tensors kept in plain attributes count as buffers."""
    params: States = dict(module.named_parameters())
    buffers: States = dict(module.named_buffers())
    for prefix, child in module.named_modules():
        for name, value in vars(child).items():
            if isinstance(value, torch.Tensor):
                buffers[f"{prefix}.{name}" if prefix else name] = value
    return params, buffers


def extract_jax(
    module: torch.nn.Module, method: str | None = None, *, mutable: bool = False
) -> tuple[dict[str, jax.Array], Callable[..., Any]]:
    """A module as JAX sees it: its state, and a pure function.

    Args:
        module: on any device; CPU tensors are copied.
        method: the method that the function calls; the module itself if None.
        mutable: the function also gives the state after the call, with the running statistics that it wrote.

    Returns:
        ``(states, fn)``: parameters and buffers by name, and ``fn(states, args, kwargs=None, *, key=None)`` over nests of
        `jax.Array`s, for `jax.jit`, `jax.grad` and the like. With a ``key`` random numbers are drawn from it; without,
        they come from torchax's state, and are the same in every call of a compiled function. With `mutable` the function
        gives ``(result, states)``.
    """
    params, buffers = extract_all_buffers(module)
    states = {name: to_array(t.detach()) for name, t in {**params, **buffers}.items()}

    def call(states: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = call_with(module, method, states, args, kwargs)
        return (out, states) if mutable else out

    def fn(states: dict[str, Any], args: Any, kwargs: dict[str, Any] | None = None, *, key: Any = None) -> Any:
        args = args if isinstance(args, tuple) else tuple(args) if isinstance(args, list) else (args,)
        given = None
        if key is not None:
            seed = jax.random.bits(key, (2,), "uint32")
            given = {_random.default(0).storage: jnp.append(seed, jnp.uint32(0))}
        return enter(call, (states, args, kwargs or {}), {}, given)

    return states, fn


class _Method(torch.nn.Module):
    """A method as a module's call, so that `torch.func.functional_call` can swap the state around it."""

    def __init__(self, module: torch.nn.Module, method: Any):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.method, str):
            return getattr(self.module, self.method)(*args, **kwargs)
        return self.method(self.module, *args, **kwargs)


def call_with(
    module: torch.nn.Module, method: Any, states: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module, or a method of it, with other parameters and buffers (by name; what is not named stays).

    Args:
        module: the module.
        method: None or ``"forward"`` for the module's call, a method's name, or a function that takes the module first.
        states: tensors by qualified name.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    if method is None or method == "forward":
        return torch.func.functional_call(module, states, args, kwargs)
    inside = {f"module.{k}": v for k, v in states.items()}
    out = torch.func.functional_call(_Method(module, method), inside, args, kwargs)
    states.update({k: inside[f"module.{k}"] for k in states})  # buffers that were replaced, as functional_call does
    return out


class JittableModule(torch.nn.Module):
    """A module whose calls run as one XLA program, with parameters and buffers as its inputs.

    Attributes:
        params: parameters by qualified name; replacing an entry changes what the next call uses.
        buffers: buffers by qualified name; written ones are kept up to date.
    """

    params: States
    buffers: States

    def __init__(self, m: torch.nn.Module, extra_jit_args: dict[str, Any] | None = None, dedup_parameters: bool = True):
        super().__init__()
        params, buffers = extract_all_buffers(m)
        d = self.__dict__  # not registered twice: the module inside is the owner
        d["_model"], d["params"], d["buffers"], d["_extra"], d["_jitted"] = (
            m,
            params,
            buffers,
            dict(extra_jit_args or {}),
            {},
        )
        self.training = m.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call, compiled."""
        return self.jittable_call("forward", *args, **kwargs)

    def jittable_call(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the module, compiled, on `params` and `buffers`."""
        if method_name not in self._jitted:
            self.make_jitted(method_name)
        return self._jitted[method_name](self.params, self.buffers, *args, **kwargs)

    def make_jitted(self, method_name: str) -> None:
        """Prepare a method for `jittable_call`."""

        def run(params: States, buffers: States, *args: Any, **kwargs: Any) -> Any:
            return self.functional_call(method_name, params, buffers, *args, **kwargs)

        self._jitted[method_name] = Compiled(run, **self._extra)

    def _compiled_method(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.jittable_call(name, *args, **kwargs)

    def functional_call(self, method_or_name: Any, params: States, buffers: States, *args: Any, **kwargs: Any) -> Any:
        """A method (a name, or a function that takes the module first) on other parameters and buffers; not compiled."""
        return call_with(self._model, method_or_name, {**params, **buffers}, args, kwargs)

    def train(self, mode: bool = True) -> JittableModule:
        super().train(mode)
        self._model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = self._model.load_state_dict(*args, **kwargs)
        params, buffers = extract_all_buffers(self._model)
        self.params.update(params)
        self.buffers.update(buffers)
        return result

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.named_buffers(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_model" not in self.__dict__:
            return super().__getattr__(name)
        if name in self._jitted and name != "forward":
            return self._compiled_method(name)
        return getattr(self._model, name)


def compile_with(fn: Any, options: CompileOptions) -> Any:
    """`torchax.compile` with options as earlier versions took them."""
    if not isinstance(fn, torch.nn.Module):
        return jax_jit(fn, options.jax_jit_kwargs)
    module = JittableModule(fn, extra_jit_args=options.jax_jit_kwargs)
    for name in options.methods_to_compile:
        module.make_jitted(name)
    return module


__all__ = ["JittableModule", "extract_all_buffers", "extract_jax", "jax_jit"]
