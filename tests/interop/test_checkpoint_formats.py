"""What checkpoints hold for others, how they are read in parts, and what damage, kills and rotation do."""

from __future__ import annotations

import collections
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torchax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax.errors import CheckpointError
from torchax.interop import CheckpointManager, open_checkpoint

from helpers import run_python

FORMATS = ["state.pt", "state.safetensors", "folder"]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


@pytest.fixture
def rows(jax_devices: Any) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax_devices[:2]), ("x",)), PartitionSpec("x"))


def hugging_face(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """A folder of two shards and an index, as Hugging Face writes them."""
    state = {k: v.clone() for k, v in net().state_dict().items()}
    parts = {"model-00001-of-00002.safetensors": list(state)[:3], "model-00002-of-00002.safetensors": list(state)[3:]}
    for file, names in parts.items():
        safetensors.torch.save_file({n: state[n] for n in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, names in parts.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


# ---------------------------------------------------------------------- with others
def test_files_are_plain_to_others(tmp_path: pathlib.Path) -> None:
    model = net().to("jax")
    for name in FORMATS[:2]:
        torchax.save_checkpoint(model.state_dict(), tmp_path / name)
    plain = torch.load(tmp_path / "state.pt", weights_only=True)
    also = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert list(plain) == list(model.state_dict()) and also.keys() == plain.keys()
    net().load_state_dict(plain)
    for key, value in model.state_dict().items():
        assert torch.equal(plain[key], value.cpu()) and torch.equal(also[key], value.cpu())


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_of_torch(name: str, tmp_path: pathlib.Path) -> None:
    """Modules, torch.optim's states and schedulers come back as what their load_state_dict takes."""

    def make() -> Any:
        model = net().to("jax")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])

    model, optimizer, scheduler = make()
    x = torch.randn(3, 4, device="jax")

    def train(model: Any, optimizer: Any, scheduler: Any) -> torch.Tensor:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        scheduler.step()
        return model[2].weight.detach().clone()

    train(model, optimizer, scheduler)
    state = {"model": model, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torchax.save_checkpoint(state, tmp_path / name)
    want = train(model, optimizer, scheduler)
    found = torchax.load_checkpoint(tmp_path / name)
    others = make()
    for key, part in zip(("model", "optimizer", "scheduler"), others, strict=True):
        part.load_state_dict(found[key])
    assert isinstance(found["scheduler"]["milestones"], collections.Counter)
    assert found["model"]._metadata == model.state_dict()._metadata
    torch.testing.assert_close(train(*others), want)
    assert others[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_shards_of_hugging_face(tmp_path: pathlib.Path, rows: Any) -> None:
    want = hugging_face(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        found = torchax.load_checkpoint(path)
        assert list(found) == list(want)
        net().load_state_dict(found)
    sharding = lambda name, shape: rows if len(shape) == 2 else None
    found = torchax.load_checkpoint(tmp_path, sharding=sharding, device="jax", dtype=torch.bfloat16)
    assert found["0.weight"].jax().sharding == rows and found["0.bias"].device.type == "jax"
    assert found["0.weight"].dtype == torch.bfloat16 and found["1.num_batches_tracked"].dtype == torch.int64
    torch.testing.assert_close(found["2.weight"].cpu(), want["2.weight"].bfloat16())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002.safetensors, which is missing; it holds 1.bias, .*2.weight"):
        torchax.load_checkpoint(tmp_path)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        torchax.load_checkpoint(tmp_path)


# ---------------------------------------------------------------------- in parts, onto devices
@pytest.mark.parametrize("name", FORMATS)
def test_onto_a_sharding(name: str, tmp_path: pathlib.Path, rows: Any) -> None:
    big = torch.arange(2**40, 2**40 + 16, device="jax").view(4, 4)
    state = {"w": big.clone().shard_(rows), "a": jax.device_put(jnp.arange(6.0), rows), "n": torch.ones(())}
    torchax.save_checkpoint(state, tmp_path / name)
    plain = torchax.load_checkpoint(tmp_path / name)
    assert torch.equal(plain["w"], big) and plain["n"].device.type == "cpu"
    for options in (
        {"sharding": {"w": rows, "a": rows}},
        {"sharding": lambda name, shape: rows if shape else None},
        {"target": state},
        {"target": {**state, "a": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=rows)}},
    ):
        found = torchax.load_checkpoint(tmp_path / name, **options)
        assert found["w"].jax().sharding == rows and found["a"].sharding == rows
        assert torch.equal(found["w"].cpu(), big.cpu()) and found["a"].tolist() == list(range(6))
    with pytest.raises(CheckpointError, match=r"do not divide their tensors: n of shape \(\)"):
        torchax.load_checkpoint(tmp_path / name, sharding=rows)


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_by_tensor(name: str, tmp_path: pathlib.Path, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"layers": [torch.full((4,), float(i), device="jax") for i in range(3)], "empty": torch.zeros(0, 3)}
    torchax.save_checkpoint(state, tmp_path / name)
    with open_checkpoint(tmp_path / name, sharding={"layers.1": rows}, dtype=torch.float64) as found:
        shown = repr(found).splitlines()
        assert name in shown[0] and "4 tensors" in shown[0] and shown[1].strip() == "layers.0: (4,) torch.float64"
        assert list(found) == ["layers.0", "layers.1", "layers.2", "empty"]
        assert found.shapes["empty"] == (0, 3) and found.dtypes["layers.0"] is torch.float64
        assert found["layers.2"].tolist() == [2] * 4 and found["layers.2"].dtype == torch.float64
        assert found["layers.1"].jax().sharding == rows and found["empty"].shape == (0, 3)
    if name != "folder":  # a sharded tensor is read in parts
        from torchax.interop import load_checkpoint

        read: list[Any] = []
        reader = type(__import__("torchax_interop.checkpoint", fromlist=["_open"])._open(tmp_path / name, None))
        original = reader.read
        monkeypatch.setattr(reader, "read", lambda *a: read.append(original(*a).shape) or original(*a))
        load_checkpoint(tmp_path / name, sharding={"layers.1": rows})
        assert read == [(4,), (2,), (2,), (4,), (0, 3)]


def test_a_target_on_meta(tmp_path: pathlib.Path) -> None:
    model = net().to("jax")
    torchax.save_checkpoint(model, tmp_path / "state.safetensors")
    with torch.device("meta"):
        empty = net()
    found = torchax.load_checkpoint(tmp_path / "state.safetensors", target=empty)
    empty.load_state_dict(found, assign=True)
    assert empty[0].weight.device.type == "jax" and torch.equal(empty[0].weight, model[0].weight)


# ---------------------------------------------------------------------- what does not fit
@pytest.mark.parametrize("name", FORMATS)
def test_mismatches_are_named(name: str, tmp_path: pathlib.Path) -> None:
    torchax.save_checkpoint({"model": net(), "lr": 0.1, "more": [1, 2]}, tmp_path / name)
    target: Any = {"model": net().state_dict(), "lr": 0.0, "more": [0, 0]}
    target["model"]["0.weight"] = torch.zeros(3, 3)
    target["model"]["0.bias"] = torch.zeros(8, dtype=torch.float64)
    target["model"]["extra"] = target["model"].pop("2.bias")
    target["more"] = (0,)
    with pytest.raises(CheckpointError) as caught:
        torchax.load_checkpoint(tmp_path / name, target=target)
    for part in (
        "model.0.weight has shape (8, 4), the target (3, 3)",
        "model.0.bias has dtype torch.float32, the target torch.float64",
        "model.extra is not in the checkpoint",
        "model.2.bias is not in the target",
        "more has 2 values, the target 1",
    ):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="lr is the float 0.1, the target has a tensor"):
        torchax.load_checkpoint(tmp_path / name, target={**target, "lr": torch.zeros(())})


def test_named_tuples_of_unknown_classes(tmp_path: pathlib.Path) -> None:
    """Loading imports nothing that the file names; a target gives the classes."""
    record = collections.namedtuple("Record", ["count", "mu"])
    record.__module__ = "colorsys"
    path = tmp_path / "state.safetensors"
    torchax.save_checkpoint((record(3, {"w": jnp.ones(3)}),), path)
    code = """
import sys, torch, torchax
found = torchax.load_checkpoint(sys.argv[1])
assert "colorsys" not in sys.modules, "loading imported a module that the file names"
assert type(found[0]).__name__ == "Record" and found[0].mu["w"].shape == (3,)
"""
    run_python(code, str(path))
    state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init({"w": jnp.ones(3)})
    torchax.save_checkpoint(state, path)
    found = torchax.load_checkpoint(path, target=state)
    assert jax.tree.structure(found) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors", "plain.pt"])
def test_cut_off_files_name_their_tensors(name: str, tmp_path: pathlib.Path) -> None:
    state = {"first": torch.ones(500), "layers.0.second": torch.ones(500)}
    if name == "plain.pt":
        torch.save(state, tmp_path / name)
    else:
        torchax.save_checkpoint(state, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match=r"layers\.0\.second") as caught:
        torchax.load_checkpoint(tmp_path / name)
    assert ("first" in str(caught.value)) == name.endswith(".pt")


def test_a_damaged_folder_names_its_tensors(tmp_path: pathlib.Path) -> None:
    state = {"first": torch.rand(500, device="jax"), "second": torch.rand(5000, device="jax")}
    torchax.save_checkpoint(state, tmp_path / "folder")
    largest = max((p for p in (tmp_path / "folder").rglob("d/*")), key=lambda p: p.stat().st_size)
    os.truncate(largest, 1000)
    with pytest.raises(CheckpointError, match="of 2 tensors are damaged or cut off: .*second"):
        torchax.load_checkpoint(tmp_path / "folder")


def test_what_cannot_be_saved(tmp_path: pathlib.Path) -> None:
    for value, message in (
        ({"a": {"f": print}}, "a.f is a builtins.builtin_function_or_method"),
        ({"a": np.array(["text"])}, "a has dtype <U4"),
        ({"a": torch.eye(2).to_sparse()}, "dense"),
        ({("a", print): 1}, "a key of type"),
    ):
        for name in FORMATS:
            with pytest.raises(CheckpointError, match=message):
                torchax.save_checkpoint(value, tmp_path / name)
    with pytest.raises(CheckpointError, match="mount the storage"):
        torchax.save_checkpoint({}, "gs://bucket/state")
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------- in the background, and killed
@pytest.mark.parametrize("name", FORMATS)
def test_in_the_background(name: str, tmp_path: pathlib.Path) -> None:
    """What was saved is the state at the call, although its buffers are given away right after."""
    w = torch.zeros(64, device="jax")
    bump = torchax.compile(lambda: w.add_(1))
    bump(), bump()
    torchax.save_checkpoint({"w": w}, tmp_path / name)
    bump()
    saving = torchax.save_checkpoint({"w": w}, tmp_path / name, wait=False)
    bump()
    saving.wait()
    assert saving.done() and torchax.load_checkpoint(tmp_path / name)["w"].tolist() == [3] * 64
    torchax.save_checkpoint({"w": w}, tmp_path / name, wait=False)
    assert torchax.load_checkpoint(tmp_path / name)["w"].tolist() == [4] * 64  # loading waits


def test_the_end_of_the_program_waits(tmp_path: pathlib.Path) -> None:
    code = """
import sys, torch, torchax
state = {"w": torch.arange(1_000_000, device="jax")}
for name in ("a.pt", "folder"):
    torchax.save_checkpoint(state, sys.argv[1] + "/" + name, wait=False)
manager = torchax.interop.CheckpointManager(sys.argv[1] + "/run", wait=False)
manager.save(3, state)
"""
    run_python(code, str(tmp_path))
    for name in ("a.pt", "folder", "run"):
        assert torchax.load_checkpoint(tmp_path / name)["w"][-1].item() == 999_999


def test_a_failure_in_the_background(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchax.save_checkpoint({"x": 1}, tmp_path / "a.pt")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"saving the checkpoint .*a.pt failed: OSError: no space"):
        saving = torchax.save_checkpoint({"x": 2}, tmp_path / "a.pt", wait=False)
        with pytest.raises(OSError, match="no space"):
            saving.wait()
    assert torchax.load_checkpoint(tmp_path / "a.pt") == {"x": 1} and os.listdir(tmp_path) == ["a.pt"]


KILLED = """
import os, pathlib, random, signal, sys, time
import numpy as np, torch, torchax, torchax_interop

def child(path, report):
    name = os.path.basename(path)
    manager = torchax_interop.CheckpointManager(path, keep=2) if name == "managed" else None
    if manager or os.path.lexists(path) or os.path.exists(os.path.join(os.path.dirname(path), f".{name}.ready")):
        found = (manager.resume() or (0, None))[1] if manager else torchax.load_checkpoint(path)
    else:
        found = None
    n = 0
    if found is not None:
        n = found["n"]
        assert all((t == n).all() for t in found["w"]), (name, n, [t[:3] for t in found["w"]])
    os.write(report, f"found {n}\\n".encode())
    while True:
        n += 1
        state = {"n": n, "w": [np.full(30_000, n), torch.full((30_000,), n), np.full(3, n)]}
        os.write(report, f"begin {n}\\n".encode())
        manager.save(n, state) if manager else torchax.save_checkpoint(state, path)
        os.write(report, f"end {n}\\n".encode())

random.seed(0)
interrupted = 0
for name in ("a.pt", "a.safetensors", "folder", "managed"):
    path, complete = os.path.join(sys.argv[1], name), 0
    for turn in range(5):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            try:
                child(path, writing)
            except BaseException as error:
                os.write(writing, f"failed {type(error).__name__}: {error}\\n".encode())
            os._exit(1)
        os.close(writing)
        lines = os.fdopen(reading)
        seen = [lines.readline(), lines.readline(), lines.readline(), lines.readline()]
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        seen = [line.split(" ", 1) for line in seen + lines.readlines()]
        os.waitpid(pid, 0)
        assert not [line for line in seen if line[0] == "failed"], (name, seen[-3:])
        found = int(seen[0][1])
        assert found in (complete, complete + 1), (name, turn, found, complete)
        complete = max(int(n) for kind, n in seen if kind in ("found", "end"))
        interrupted += seen[-1][0] == "begin"
    drafts = [p for p in os.listdir(sys.argv[1]) if p.startswith(f".{name}")]
    assert len(drafts) <= 2, drafts
    if name == "managed":
        assert len([p for p in os.listdir(path) if p.isdigit()]) <= 3
print(interrupted)
"""


def test_killed_in_the_middle_of_a_save(tmp_path: pathlib.Path) -> None:
    """Processes that save again and again are killed; the next one finds the last complete checkpoint, or the one after."""
    assert int(run_python(KILLED, str(tmp_path))) >= 10  # of 20 were in the middle of a save


# ---------------------------------------------------------------------- rotation
def test_rotation_and_resume(tmp_path: pathlib.Path, rows: Any) -> None:
    path = tmp_path / "run"
    with CheckpointManager(path, keep=2, wait=False) as manager:
        assert manager.resume() is None and manager.latest_step() is None
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            manager.restore()
        for step in (1, 2, 5):
            manager.save(step, {"n": step, "w": torch.full((4,), float(step), device="jax")})
        manager.wait()
        assert manager.all_steps() == [2, 5] and manager.latest_step() == 5
        with pytest.raises(CheckpointError, match="of step 5 already"):
            manager.save(5, {})
        assert manager.restore(2)["n"] == 2
    with CheckpointManager(path, keep=2) as manager:
        found = manager.resume(sharding=rows)
        assert found is not None and found[0] == 5 and found[1]["w"].jax().sharding == rows
        manager.delete(5)
        assert manager.latest_step() == 2
        with pytest.raises(CheckpointError, match="n is not in the target"):
            manager.restore(target={"w": torch.zeros(4)})
    assert torchax.load_checkpoint(path)["n"] == 2
    with pytest.raises(ValueError, match="keep must be at least 1"):
        CheckpointManager(path, keep=0)
