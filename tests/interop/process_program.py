"""One of two processes that train a model together; run by test_distributed.py. Prints JSON."""

from __future__ import annotations

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
from torchax import interop

port, rank, folder = sys.argv[1:]
if int(port):
    torch.manual_seed(int(rank))  # another one in each process: process 0's counts
    torchax.distributed.initialize(f"localhost:{port}", 2, int(rank))
else:
    torch.manual_seed(0)
world = torchax.distributed.process_count()
mesh = interop.make_mesh(data=-1)
model = interop.deferred_init(
    lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4)), mesh, interop.fsdp(min_size=1)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


@torchax.compile
def step(x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.sin(torch.arange(8.0) * (i + 1)), torch.tensor(i % 4)


losses = []
loader = torch.utils.data.DataLoader(
    Rows(), batch_size=16 // world, sampler=torchax.distributed.sampler(Rows(), shuffle=False)
)
for x, y in torchax.distributed.global_batches(loader, mesh):
    assert x.shape == (16, 8)
    losses.append(step(x, y).item())
report = {
    "losses": losses, "local": torch.jax.device_count(), "world": world, "mesh": mesh.size,
    "held": sum(interop.bytes_per_device(model).values()), "norm": model[0].weight.full_tensor().norm().item(),
}  # fmt: skip
try:
    model[0].weight.cpu()
    report["refused"] = ""
except RuntimeError as error:
    report["refused"] = str(error)
report["repr"] = repr(model[0].weight)
torchax.save_checkpoint({"model": model.state_dict()}, folder)
with torch.no_grad():
    for p in model.parameters():
        p.zero_()
found = torchax.load_checkpoint(folder, target={"model": model.state_dict()})
model.load_state_dict(found["model"])
report["norm again"] = model[0].weight.full_tensor().norm().item()
torchax.distributed.barrier("done")
print(json.dumps(report))
