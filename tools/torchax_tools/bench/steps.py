"""Compiled training steps against hand-written JAX with optax of the same models: run time, work, memory, tracing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax

from . import gpt
from .measure import Row, failed, ratio
from .models import GPT, LENGTH, VOCABULARY, ResNet18

Arrays = dict[str, jax.Array]
# the loss of a batch, with the buffers after it
Loss = Callable[[Arrays, Arrays, jax.Array, jax.Array], tuple[jax.Array, Arrays]]


def _cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# ---------------------------------------------------------------------- the models in JAX
def _mlp(w: Arrays, buffers: Arrays, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Arrays]:
    for i in (0, 2):
        x = jax.nn.relu(x @ w[f"{i}.weight"].T + w[f"{i}.bias"])
    return _cross_entropy(x @ w["4.weight"].T + w["4.bias"], y), buffers


class _ResNet:
    """ResNet-18 in training mode; notes the running statistics."""

    def __init__(self, w: Arrays, buffers: Arrays):
        self.w, self.buffers = w, dict(buffers)

    def conv(self, x: jax.Array, name: str, stride: int) -> jax.Array:
        kernel = self.w[name + ".weight"]
        edge = kernel.shape[-1] // 2
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((edge, edge), (edge, edge)), dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        mean = x.mean((0, 2, 3), keepdims=True)
        variance = jnp.square(x - mean).mean((0, 2, 3), keepdims=True)
        count = x.size // x.shape[1]
        for key, value in (("running_mean", mean), ("running_var", variance * (count / (count - 1)))):
            self.buffers[f"{name}.{key}"] = 0.9 * self.buffers[f"{name}.{key}"] + 0.1 * value.ravel()
        self.buffers[f"{name}.num_batches_tracked"] = self.buffers[f"{name}.num_batches_tracked"] + 1
        scale = jax.lax.rsqrt(variance + 1e-5) * self.w[name + ".weight"][:, None, None]
        return (x - mean) * scale + self.w[name + ".bias"][:, None, None]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.conv(x, "stem.0", 1), "stem.1"))
        for i in range(8):
            name, stride = f"stages.{i}", 2 if i in (2, 4, 6) else 1
            y = jax.nn.relu(self.norm(self.conv(x, name + ".conv1", stride), name + ".norm1"))
            y = self.norm(self.conv(y, name + ".conv2", 1), name + ".norm2")
            if f"{name}.short.0.weight" in self.w:
                x = self.norm(self.conv(x, name + ".short.0", stride), name + ".short.1")
            x = jax.nn.relu(y + x)
        return x.mean((2, 3)) @ self.w["head.weight"].T + self.w["head.bias"]


def _resnet(w: Arrays, buffers: Arrays, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Arrays]:
    net = _ResNet(w, buffers)
    return _cross_entropy(net(x), y), net.buffers


def _gpt(w: Arrays, buffers: Arrays, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Arrays]:
    return _cross_entropy(gpt.forward(w, x), y), buffers


def jax_step(loss: Loss, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def step(w: Arrays, buffers: Arrays, state: Any, x: jax.Array, y: jax.Array) -> Any:
        (value, buffers), grads = jax.value_and_grad(loss, has_aux=True)(w, buffers, x, y)
        updates, state = optimizer.update(grads, state, w)
        return optax.apply_updates(w, updates), buffers, state, value

    return jax.jit(step, donate_argnums=(0, 1, 2))


# ---------------------------------------------------------------------- the steps
def torch_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., torch.Tensor]:
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)


def cases() -> Iterator[tuple[str, nn.Module, torch.Tensor, torch.Tensor, Any, Loss, optax.GradientTransformation]]:
    layers = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    sgd, labels = optax.sgd(0.01, momentum=0.9), torch.randint(0, 10, (128,))
    yield "MLP, SGD", nn.Sequential(*layers), torch.randn(128, 784), labels, _sgd, _mlp, sgd
    yield "ResNet-18, SGD", ResNet18(), torch.randn(16, 3, 32, 32), labels[:16], _sgd, _resnet, sgd
    tokens = torch.randint(0, VOCABULARY, (4, LENGTH))
    adamw = optax.adamw(1e-3, weight_decay=0.01)
    yield "GPT, AdamW", GPT(width=256), tokens, tokens.roll(-1, 1), _adamw, _gpt, adamw


def work(compiled: Any) -> tuple[float, float, float]:
    """Flops, bytes accessed, and bytes of temporaries of a compiled program."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return cost["flops"], cost["bytes accessed"], memory.temp_size_in_bytes


def arrays_of(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, transform: optax.GradientTransformation
) -> tuple[list[Any], list[jax.Array]]:
    """What the step by hand holds (weights, buffers, the optimizer's state), and its batch."""
    weights = {k: jnp.array(v.detach().numpy()) for k, v in model.named_parameters()}
    buffers = {k: jnp.array(v.numpy()) for k, v in model.named_buffers()}
    batch = [jnp.asarray(t.numpy(), jnp.int32 if t.dtype == torch.int64 else None) for t in (x, y)]
    return [weights, buffers, transform.init(weights)], batch


def steps() -> Iterator[Row]:
    """For each model: run time, flops, bytes, temporaries, time to trace."""
    for name, model, x, y, torch_optimizer, loss, transform in cases():
        try:
            yield from _compared(name, model, x, y, torch_optimizer, loss, transform)
        except Exception as error:
            yield failed("steps", name, error)


def _compared(
    name: str,
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    torch_optimizer: Callable[[Any], torch.optim.Optimizer],
    loss: Loss,
    transform: optax.GradientTransformation,
) -> Iterator[Row]:
    held, (ax, ay) = arrays_of(model, x, y, transform)
    by_hand = jax_step(loss, transform)
    start = time.perf_counter()
    lowered = by_hand.lower(*held, ax, ay)
    trace_theirs = time.perf_counter() - start
    theirs = lowered.compile()

    on_cpu = copy.deepcopy(model)
    cpu_step = torch_step(on_cpu, torch_optimizer(on_cpu.parameters()))
    model = model.to("jax")
    compiled = torchax.compile(torch_step(model, torch_optimizer(model.parameters())))
    jx, jy = x.to("jax"), y.to("jax")
    compiled(jx, jy)  # makes the optimizer's state
    start = time.perf_counter()
    ours = compiled.lower(jx, jy)
    trace_ours = time.perf_counter() - start
    ours = ours.compile()

    def hand_step() -> Any:
        *held[:], value = theirs(*held, ax, ay)
        return value

    first, other = float(compiled(jx, jy)), float(hand_step())
    if not np.isfinite([first, other]).all():
        raise ArithmeticError(f"losses are {first} and {other}")
    yield ratio(
        "steps", f"{name}: run", lambda: compiled(jx, jy), hand_step, "JAX + optax", 1.05, lambda: cpu_step(x, y)
    )
    goals = {"flops": 1.02, "bytes": 1.02, "temporaries": 1.05}
    for (what, goal), mine, other in zip(goals.items(), work(ours), work(theirs), strict=True):
        yield Row("steps", f"{name}: {what}", mine / other, "x", "JAX + optax", goal)
    yield Row("steps", f"{name}: tracing", trace_ours / trace_theirs, "x", "JAX + optax", 2.0, trace_ours, trace_theirs)
