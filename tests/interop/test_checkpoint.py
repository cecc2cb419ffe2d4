"""`save_checkpoint` and `load_checkpoint`."""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn as nn
import torchax
from torchax.errors import CheckpointError

FORMATS = ["state.pt", "state.safetensors", "folder"]


class Progress(NamedTuple):
    epoch: int
    best: Any


def example() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("jax")
    weights = dict(model.named_parameters())
    return {
        "weights": weights,
        "buffers": dict(model.named_buffers()),
        "opt_state": optax.adamw(1e-3).init({k: v.detach().jax() for k, v in weights.items()}),
        "epoch": 10,
        "progress": Progress(3, torch.tensor(0.5)),
        "others": [
            None,
            True,
            1.5,
            "text",
            (1, 2),
            {2: jnp.arange(3, dtype=jnp.bfloat16)},
            np.arange(2),
            torch.bfloat16,
            1 + 2j,
        ],
        "wide": torch.tensor([2**40], device="jax"),
        "key": jax.random.key(3),
    }


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b) or isinstance(a, torch.Tensor)
    if isinstance(a, torch.Tensor):
        assert a.device == b.device and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu())
    elif isinstance(a, jax.Array) and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        assert a.dtype == b.dtype and (jax.random.key_data(a) == jax.random.key_data(b)).all()
    elif isinstance(a, (jax.Array, np.ndarray)):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for k in a:
            same(a[k], b[k])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back(name: str, tmp_path: pathlib.Path) -> None:
    state = example()
    torchax.save_checkpoint(state, tmp_path / "deep" / name)
    found = torchax.load_checkpoint(tmp_path / "deep" / name)
    same(found, state)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("jax")
    model.load_state_dict({**found["weights"], **found["buffers"]})
    torch.testing.assert_close(model[0].weight, state["weights"]["0.weight"])
    assert not [p for p in (tmp_path / "deep").iterdir() if "tmp" in p.name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_target_gives_the_containers(name: str, tmp_path: pathlib.Path) -> None:
    params = {"w": jnp.ones(3)}
    state = optax.adam(1e-3).init(params)
    torchax.save_checkpoint(state, tmp_path / name)
    found = torchax.load_checkpoint(tmp_path / name, target=state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    with pytest.raises(CheckpointError, match="shape"):
        torchax.load_checkpoint(tmp_path / name, target=optax.adam(1e-3).init({"w": jnp.ones(4)}))
    with pytest.raises(CheckpointError, match="state has 2 values, the target 1"):
        torchax.load_checkpoint(tmp_path / name, target=[1])


@pytest.mark.parametrize("name", FORMATS)
def test_steps(name: str, tmp_path: pathlib.Path) -> None:
    for step in (1, 2, 10):
        torchax.save_checkpoint({"n": step}, tmp_path / name, step=step)
    assert torchax.load_checkpoint(tmp_path / name)["n"] == 10
    assert torchax.load_checkpoint(tmp_path / name, step=2)["n"] == 2


def test_overwriting(tmp_path: pathlib.Path) -> None:
    for name in FORMATS:
        for i in range(2):
            torchax.save_checkpoint({"x": torch.full((2,), float(i))}, tmp_path / name)
        assert torchax.load_checkpoint(tmp_path / name)["x"].tolist() == [1, 1]


def test_a_failed_save_leaves_the_old_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    torchax.save_checkpoint({"x": 1}, path)
    with pytest.raises(CheckpointError, match=r"x is a builtins.object"):
        torchax.save_checkpoint({"x": object()}, path)

    def full(fd: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        torchax.save_checkpoint({"x": 2}, path)
    monkeypatch.undo()
    assert torchax.load_checkpoint(path) == {"x": 1} and os.listdir(tmp_path) == ["a.pt"]


def test_missing_and_damaged(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*a\.pt"):
        torchax.load_checkpoint(path)
    with pytest.raises(CheckpointError, match="folder"):
        torchax.load_checkpoint(tmp_path / "folder")
    torchax.save_checkpoint(example(), path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"a\.pt.*(cannot be read|damaged)"):
            torchax.load_checkpoint(path)
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match=r"new cannot be read.*no model\.safetensors is in it: it is empty"):
        torchax.load_checkpoint(tmp_path / "new")
    (tmp_path / "new" / "weights.bin").touch()
    with pytest.raises(CheckpointError, match=r"it holds weights\.bin"):
        torchax.load_checkpoint(tmp_path / "new")


def test_no_code_from_the_file(tmp_path: pathlib.Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="evil.pt"):
        torchax.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_plain_files_of_torch(tmp_path: pathlib.Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pt")
    assert torchax.load_checkpoint(tmp_path / "plain.pt")["w"].tolist() == [1, 1]


def test_a_target_is_matched_by_key(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state.pt"
    torchax.save_checkpoint({"b": torch.ones(2, device="jax"), "a": torch.zeros(2, device="jax")}, path)
    target = {"a": torch.empty(2, device="jax"), "b": torch.empty(2, device="jax")}
    found = torchax.load_checkpoint(path, target=target)
    assert found["a"].tolist() == [0, 0]
    assert found["b"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="c is not in the checkpoint; b is not in the target"):
        torchax.load_checkpoint(path, target={"a": target["a"], "c": target["b"]})
