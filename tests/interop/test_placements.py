"""The words of torch.distributed.tensor on device jax; meshes of earlier versions."""

from __future__ import annotations

import jax
import pytest
import torch
import torch.nn as nn
import torchax
from jax.sharding import PartitionSpec as P
from torch.distributed.tensor import Partial, Replicate, Shard
from torchax import interop, mesh_util


@pytest.fixture
def mesh(jax_devices):
    return interop.init_device_mesh("jax", (2, 2), mesh_dim_names=("a", "b"))


def trimmed(spec):
    """Without the Nones at its end, which mean nothing."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return entries


CASES = [
    ((Shard(0), Shard(1)), P("a", "b")),
    ((Shard(1), Replicate()), P(None, "a")),
    ((Replicate(), Shard(-2)), P("b", None)),
    ((Shard(0), Shard(0)), P(("a", "b"), None)),
    ((Replicate(), Replicate()), P(None, None)),
    (None, P(None, None)),
]


@pytest.mark.parametrize(("placements", "spec"), CASES)
@pytest.mark.parametrize("device", ["cpu", "jax"])
def test_distribute_redistribute_full(mesh, placements, spec, device):
    x = torch.arange(32.0).reshape(4, 8)
    t = interop.distribute_tensor(x.to(device), mesh, placements)
    assert t.device.type == "jax" and trimmed(t.jax().sharding.spec) == trimmed(spec)
    shown = tuple(Shard(p.dim % 2) if isinstance(p, Shard) else p for p in placements or (Replicate(), Replicate()))
    assert t.placements == shown and t.device_mesh.mesh_dim_names == ("a", "b") and t.device_mesh.size() == 4
    assert t.full_tensor().jax().sharding.is_fully_replicated and t.full_tensor().cpu().equal(x)
    moved = t.redistribute(placements=(Replicate(), Shard(0)))
    assert moved.placements == (Replicate(), Shard(0)) and moved.cpu().equal(x)
    assert (t * 2).sum().item() == (x * 2).sum().item()


def test_gradients_go_through_redistribute(mesh):
    x = interop.distribute_tensor(torch.ones(4, 4, requires_grad=True), mesh, (Shard(0), Replicate()))
    assert x.is_leaf and x.requires_grad
    (
        x.redistribute(placements=(Replicate(), Shard(1))).full_tensor() * torch.arange(4.0, device="jax")
    ).sum().backward()
    assert x.grad.cpu().equal(torch.arange(4.0).expand(4, 4))
    weight = interop.distribute_tensor(nn.Parameter(torch.ones(4, 4)), mesh, (Shard(0), Replicate()))
    assert isinstance(weight, nn.Parameter)


def test_distribute_module(mesh):
    def by_rows(name, module, mesh):
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(interop.distribute_tensor(module.weight, mesh, (Shard(0), Replicate())))

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(4, 4)
    want = model.eval()(x)
    interop.distribute_module(model, mesh, by_rows)
    assert model[0].weight.placements == (Shard(0), Replicate())
    assert model[1].running_mean.placements == (Replicate(), Replicate())
    torch.testing.assert_close(model(x.to("jax")).cpu(), want)


def test_what_does_not_fit_is_refused(mesh):
    x = torch.ones(3, 4)
    cases = {
        r"one placement for each dimension of the mesh": (Shard(0),),
        r"dimension 0 of size 3 cannot be divided": (Shard(0), Replicate()),
        r"does not have": (Shard(2), Replicate()),
        r"Shard and Replicate; got Partial": (Partial(), Replicate()),
    }
    for message, placements in cases.items():
        with pytest.raises(ValueError, match=message):
            interop.distribute_tensor(x, mesh, placements)
    with pytest.raises(ValueError, match="device_type 'jax'"):
        interop.init_device_mesh("cuda", (2,))
    with pytest.raises(ValueError, match="needs 64 devices"):
        interop.init_device_mesh("jax", (64,))
    with pytest.raises(ValueError, match=r"names devices \[77\]"):
        interop.DeviceMesh("jax", [0, 77])
    assert not hasattr(torch.ones(2, device="jax"), "placements")
    plain = torch.ones(2, device="jax")
    assert plain.full_tensor() is plain


def test_shard_module_takes_torchs_mesh(mesh):
    model = interop.shard_module(nn.Linear(4, 4), mesh, {"weight": ("a", "b")})
    assert model.weight.placements == (Shard(0), Shard(1))


def test_meshes_of_earlier_versions(jax_devices):
    mesh = mesh_util.Mesh.fsdp_mesh()
    model = mesh.initialize_model_sharded(nn.Linear, (8, 6))
    assert model.weight.jax().sharding.spec == P(None, "fsdp") and model.bias.jax().sharding.is_fully_replicated
    mesh.shard_model(model, override_sharder=lambda name, shape: P())
    assert model.weight.jax().sharding.is_fully_replicated
    strict = mesh_util.Mesh(jax.make_mesh((4,), ("x",)))
    assert isinstance(strict, torchax.interop.Mesh)
    with pytest.raises(ValueError, match=r"no dimension of 'bias', of shape \[6\]"):
        strict.shard_model(nn.Linear(8, 6))
