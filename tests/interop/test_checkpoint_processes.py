"""One checkpoint written by two processes, each the parts of arrays that it holds."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

from helpers import ROOT

PROGRAM = """
import os, sys
os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2")
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np, torch, torchax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
folder = sys.argv[3]
rows = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))

def array(k):
    return jax.make_array_from_callback((8,), rows, lambda i: np.arange(8, dtype=np.float32)[i] * k)

def check(found, k):
    mine = [np.asarray(s.data).tolist() for s in found.addressable_shards]
    first = 4 * int(sys.argv[2])
    assert mine == [[first * k, (first + 1) * k], [(first + 2) * k, (first + 3) * k]], mine

for k in (1, 2):  # the second one takes the place of the first
    torchax.save_checkpoint({"t": torchax.tensor.Tensor(array(k)), "a": array(k), "n": k, "cpu": torch.ones(2) * k}, folder + "/state")
found = torchax.load_checkpoint(folder + "/state", sharding={"t": rows, "a": rows})
assert found["n"] == 2 and found["cpu"].tolist() == [2, 2]
check(found["t"].jax(), 2)
check(found["a"], 2)
torchax.save_checkpoint({"a": array(3)}, folder + "/state", wait=False).wait()
check(torchax.load_checkpoint(folder + "/state", target={"a": array(0)})["a"], 3)
with torchax.interop.CheckpointManager(folder + "/run", keep=2) as manager:
    for k in (1, 2, 3):
        manager.save(k, {"a": array(k)})
    assert manager.all_steps() == [2, 3]
    check(manager.resume(target={"a": array(0)})[1]["a"], 3)
try:
    torchax.save_checkpoint({"a": array(1)}, folder + "/state.pt")
except torchax.errors.CheckpointError as error:
    assert "a lies on devices of several processes; save to a folder" in str(error)
else:
    raise AssertionError("a file was written from one process's parts")
print("complete")
"""


def test_two_processes(tmp_path: pathlib.Path) -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i), str(tmp_path)],
            env=dict(os.environ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, output in zip(processes, outputs, strict=True):
        assert p.returncode == 0 and "complete" in output, output
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
