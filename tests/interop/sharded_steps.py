"""Trains a small model on eight virtual devices in several layouts; prints what it saw as JSON. Run by test_sharding.py."""

from __future__ import annotations

import json
import os
import re
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace("device_count=4", "device_count=8")

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax import interop

WIDTH, HEADS, VOCABULARY = 32, 4, 64


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + F.dropout(self.down_proj(F.gelu(self.up_proj(self.norm2(x)))), 0.1, self.training)


class Model(nn.Module):
    """A transformer with the names of transformers' models, the output layer tied to the embedding."""

    def __init__(self, layers=1):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x) * self.scale


def layouts():
    """name -> (mesh, rules)."""
    both = interop.make_mesh(data=2, model=4)
    return {
        "data parallel": (interop.make_mesh(data=8), interop.data_parallel()),
        "fsdp": (interop.make_mesh(data=8), interop.fsdp()),
        "tensor parallel": (interop.make_mesh(data=2, model=4), [interop.tensor_parallel(), interop.data_parallel()]),
        "combined": (both, [interop.tensor_parallel(), interop.fsdp()]),
    }


def train(layout=None, steps=3, compiled=True, dropout=True):
    torch.manual_seed(0)
    model = Model()
    if layout:
        interop.shard_module(model, *layout)
    else:
        model.to("jax")
    model.train(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        return loss

    run = torchax.compile(step) if compiled else step
    tokens = torch.randint(0, VOCABULARY, (steps, 16, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for batch in tokens:
        x, y = batch[:, :-1], batch[:, 1:]
        x, y = interop.shard_batch((x, y), layout[0]) if layout else (x.to("jax"), y.to("jax"))
        losses.append(run(x, y).item())
    return losses, model, optimizer, run, (x, y)


def program_text(run, leaves):
    """The compiled program of the last call."""
    (program,) = next(iter(run._cache.values()))
    return program.lower(leaves).compile().as_text()


def collectives(text):
    """Kind -> number of elements of each of its results."""
    found: dict[str, list[int]] = {}
    for line in text.splitlines():
        m = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", line)
        if m:
            for shape in re.findall(r"\w+\[([\d,]*)\]", m[1]):
                n = 1
                for d in shape.split(","):
                    n *= int(d) if d else 1
                found.setdefault(m[2], []).append(n)
    return found


def main():
    report = {"single": train()[0], "single eager": train(compiled=False, dropout=False, steps=1)[0]}
    for name, layout in layouts().items():
        losses, model, optimizer, run, leaves = train(layout)
        report[name] = {
            "losses": losses,
            "misses": run.cache_info().misses,
            "bytes": max(interop.bytes_per_device(model).values()),
            "state bytes": max(interop.bytes_per_device(optimizer).values()),
            "grad bytes": max(interop.bytes_per_device([p.grad for p in model.parameters()]).values()),
            "total": sum(p.numel() * 4 for p in model.parameters()),
            "collectives": collectives(program_text(run, list(leaves))),
        }
    report["fsdp eager"] = train(layouts()["fsdp"], compiled=False, dropout=False, steps=1)[0]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
