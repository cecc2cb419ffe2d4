"""Train a PyTorch model in JAX with optax, save {"weights", "buffers", "opt_state", "epoch"}, load it, and go on.

python examples/save_and_resume.py
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import jax
import optax
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax.interop import jax_view, torch_view

net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
tx = optax.adamw(1e-2)


def loss_fn(weights: Any, buffers: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
    logits = torch.func.functional_call(net, {**weights, **buffers}, (x,))
    return F.cross_entropy(logits, labels), buffers  # BatchNorm has written them


@jax.jit
def train_step(state: dict[str, Any], x: jax.Array, labels: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    run = jax.value_and_grad(jax_view(loss_fn), has_aux=True)
    (loss, buffers), grads = run(state["weights"], state["buffers"], x, labels)
    updates, opt_state = tx.update(grads, state["opt_state"], state["weights"])
    weights = optax.apply_updates(state["weights"], updates)
    return {"weights": weights, "buffers": buffers, "opt_state": opt_state, "epoch": state["epoch"] + 1}, loss


def fresh_state() -> dict[str, Any]:
    weights = jax_view({name: w.detach() for name, w in net.named_parameters()})
    buffers = jax_view(dict(net.named_buffers()))
    return {"weights": weights, "buffers": buffers, "opt_state": tx.init(weights), "epoch": 0}


def main() -> None:
    torch.manual_seed(0)
    x = jax.random.normal(jax.random.key(1), (32, 16))
    labels = jax.random.randint(jax.random.key(2), (32,), 0, 4)

    state = fresh_state()
    for _ in range(5):
        state, loss = train_step(state, x, labels)
    print(f"epoch {int(state['epoch'])}: loss {float(loss):.5f}")

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "checkpoint.pt"
        torchax.save_checkpoint(state, path)
        restored = torchax.load_checkpoint(path)
        print(f"restored at epoch {int(restored['epoch'])} from {path.stat().st_size} bytes")

        (path.parent / "damaged.pt").write_bytes(path.read_bytes()[:1000])
        try:
            torchax.load_checkpoint(path.parent / "damaged.pt")
        except torchax.errors.CheckpointError as error:
            print("a damaged checkpoint raises", type(error).__name__)
        else:
            raise AssertionError("the damaged checkpoint was loaded")

    for _ in range(5):
        state, loss = train_step(state, x, labels)
        restored, again = train_step(restored, x, labels)
        assert float(loss) == float(again)
    print(f"epoch {int(restored['epoch'])}: loss {float(again):.5f}, the same as without the interruption")

    net.load_state_dict(torch_view({**restored["weights"], **restored["buffers"]}))
    print("back in the PyTorch module, on", next(net.parameters()).device)


if __name__ == "__main__":
    main()
