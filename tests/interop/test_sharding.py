"""Models on several devices: the same losses as on one, memory divided, the collectives that belong there; rules that do not fit."""

from __future__ import annotations

import copy
import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest
import torch
import torch.nn as nn
import torchax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from torchax import interop

from helpers import run_python

LAYOUTS = ("data parallel", "fsdp", "tensor parallel", "combined")


@pytest.fixture(scope="module")
def report():
    script = pathlib.Path(__file__).with_name("sharded_steps.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# A training step on eight devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_those_of_one_device(report, layout):
    assert report[layout]["losses"] == pytest.approx(report["single"], rel=1e-4)
    assert report["single"][-1] < report["single"][0]
    assert report[layout]["misses"] == 2, "recorded anew after the optimizer's state existed"


def test_eager_steps_give_the_same_loss(report):
    assert report["fsdp eager"] == pytest.approx(report["single eager"], rel=1e-4)


@pytest.mark.parametrize(
    ("layout", "part"), [("data parallel", 1), ("fsdp", 1 / 8), ("tensor parallel", 1 / 4), ("combined", 1 / 8)]
)
def test_each_device_holds_its_part(report, layout, part):
    seen = report[layout]
    whole = seen["total"]
    small = 0.04 * whole  # norms and biases stay whole
    assert part * whole <= seen["bytes"] <= part * whole + small
    assert seen["grad bytes"] <= part * whole + small
    assert seen["state bytes"] <= 2 * (part * whole + small)


def test_programs_hold_the_collectives_of_their_layout(report):
    ops = {layout: report[layout]["collectives"] for layout in LAYOUTS}
    parameters = report["fsdp"]["total"] // 4
    assert set(ops["data parallel"]) == {"all-reduce"} and sum(ops["data parallel"]["all-reduce"]) >= parameters
    assert "all-gather" in ops["fsdp"] and {"all-reduce", "reduce-scatter"} & set(ops["fsdp"])
    assert max(ops["fsdp"]["all-gather"]) < parameters / 2, "parameters are gathered one by one, not all at once"
    assert "all-reduce" in ops["tensor parallel"] and "all-gather" not in ops["tensor parallel"]
    assert {"all-gather", "all-reduce"} <= set(ops["combined"])
    assert max(ops["combined"]["all-gather"]) < parameters / 2


# Rules ------------------------------------------------------------------------------------------------------------


def specs(model):
    return {n: t._s.sharding.spec for n, t in (*model.named_parameters(), *model.named_buffers())}


def test_rules_by_name_complement_each_other(jax_devices):
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 64))
    mesh = interop.make_mesh(data=2, model=2)
    rules = [("0.weight", ("model",)), (re.compile(r"^2\."), "model"), interop.fsdp(min_size=64)]
    assert interop.shard_module(model, mesh, rules) is model
    found = specs(model)
    assert found["0.weight"] == P("model", "data") and found["2.weight"] == P("model", "data")
    assert found["2.bias"] == P("model") and found["1.running_mean"] == P() == found["0.bias"]
    assert interop.bytes_per_device(model)[jax_devices[0]] < sum(p.numel() * 4 for p in model.parameters()) / 3
    model(interop.shard_batch(torch.randn(4, 8), mesh)).sum().backward()
    assert model[0].weight.grad.jax().sharding.is_equivalent_to(model[0].weight.jax().sharding, 2)
    assert model[1].running_mean.jax().sharding.is_fully_replicated and model[1].running_mean.any()


def test_a_mesh_that_does_not_divide_and_rules_that_match_nothing_change_nothing():
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 6))
    mesh = interop.make_mesh(data=4)
    cases = {
        r"'0.weight' has shape \[7, 6\]: dimension 0 of size 7 cannot be divided evenly over 4 devices": {
            "0.weight": "data"
        },
        r"'2\.\*' matches no parameter; there are 0\.weight": {"0.weight": None, "2.*": "data"},
        r"names mesh axes \['model'\]": {"*.weight": "model"},
        r"uses a mesh axis twice": {"0.weight": ("data", "data")},
        r"is about 3 dimensions": {"0.weight": (None, None, "data")},
        r"found no parameter of at least 1 elements": interop.fsdp(min_size=1),
        r"knows no layer of this model": interop.tensor_parallel("data"),
        r"about mesh axes \['model'\]": interop.tensor_parallel(),
    }
    for message, rules in cases.items():
        with pytest.raises(ValueError, match=message):
            interop.shard_module(model, mesh, rules)
        assert all(p.device.type == "cpu" for p in model.parameters())
    with pytest.raises(TypeError, match="pairs of a pattern"):
        interop.shard_module(model, mesh, ["*.weight"])
    with pytest.raises(ValueError, match="5 cannot be divided evenly over 4"):
        interop.shard_batch(torch.ones(5, 2), mesh)
    with pytest.raises(ValueError, match="needs 64 devices; there are 4"):
        interop.make_mesh(data=64)
    with pytest.raises(TypeError, match=r"expected a jax\.sharding\.Mesh"):
        interop.shard_module(model, "mesh", {})


def test_tensor_parallel_knows_the_layers_of_transformers():
    import transformers

    mesh = interop.make_mesh(model=2)
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2))
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=8,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
            )
        )
    found, _ = interop.sharding.plan(gpt2, mesh, interop.tensor_parallel())
    said = {e.names[0]: s.spec for e, s in found}
    assert said["transformer.h.0.attn.c_attn.weight"] == P(None, "model")  # Conv1D: inputs first
    assert said["transformer.h.0.mlp.c_proj.weight"] == P("model", None)
    assert said["transformer.wte.weight"] == P()  # eleven words are not divided by two
    found, _ = interop.sharding.plan(llama, mesh, interop.tensor_parallel())
    said = {e.names[0]: s.spec for e, s in found}
    assert said["model.embed_tokens.weight"] == P("model", None) == said["model.layers.0.mlp.up_proj.weight"]
    assert said["model.layers.0.self_attn.o_proj.weight"] == P(None, "model")
    assert said["model.norm.weight"] == P()
    with pytest.raises(ValueError, match="on device meta"):
        interop.shard_module(llama, mesh, interop.tensor_parallel())


# What keeps the layout --------------------------------------------------------------------------------------------


def test_writes_and_copies_keep_the_layout(jax_devices):
    sharding = NamedSharding(interop.make_mesh(a=2, b=2), P("a", "b"))
    x, want = torch.arange(16.0, device="jax").reshape(4, 4).clone().shard_(sharding), torch.arange(16.0).reshape(4, 4)
    for write in (
        lambda t: t.add_(1),
        lambda t: t[1:3, 0].fill_(7),
        lambda t: t.t().mul_(torch.arange(4.0, device=t.device)),
        lambda t: t.copy_(torch.arange(16.0).reshape(4, 4) ** 2),
        lambda t: torch._foreach_mul_([t], 2.0),
        lambda t: t.__setitem__((0, slice(None)), torch.ones(4, device=t.device)),
    ):
        write(x)
        write(want)
        assert x.jax().sharding == sharding and x.cpu().equal(want)
    for copy_of in (torch.zeros_like, torch.randn_like, torch.clone, lambda t: t.bfloat16(), copy.deepcopy):
        y = copy_of(x)
        assert y.jax().sharding == sharding, copy_of
        y.zero_()
        assert y.jax().sharding == sharding
    with pytest.raises(ValueError, match="jax:0"):
        torch.ones(4, device="jax:1").shard_(sharding)


def test_loading_moving_and_copying_a_model_keep_the_layout():
    model = nn.Linear(8, 8)
    state = copy.deepcopy(model.state_dict())
    interop.shard_module(model, interop.make_mesh(data=4), interop.fsdp(min_size=1))
    sharding = model.weight.jax().sharding
    nn.init.zeros_(model.weight)
    model.load_state_dict(state)
    assert model.weight.jax().sharding == sharding and model.weight.cpu().equal(state["weight"])
    twin = copy.deepcopy(model).bfloat16()
    assert twin.weight.jax().sharding == sharding and twin.weight.dtype is torch.bfloat16
    assert model.to("jax") is model and model.weight.jax().sharding == sharding


def test_random_numbers_go_on_in_programs_of_different_meshes():
    draws = []
    for n in (4, 2):
        mesh = interop.make_mesh(data=n)
        x = interop.shard_batch(torch.ones(8), mesh)
        noisy = torchax.compile(lambda x: x * torch.rand_like(x))
        draws += [noisy(x).cpu(), noisy(x).cpu()]
    draws.append(torch.rand(8, device="jax").cpu())
    assert len(torch.rand(2, device="jax").jax().devices()) == 1
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)


def test_a_program_follows_a_model_that_is_laid_out_anew():
    model = nn.Linear(8, 8).to("jax")
    forward = torchax.compile(lambda x: model(x))
    x = torch.randn(4, 8, device="jax")
    want = forward(x).detach().cpu()

    @torchax.compile
    def twice_negated():
        with torch.no_grad():
            model.weight.neg_().neg_()

    for n in (4, 2):
        mesh = interop.make_mesh(data=n)
        interop.shard_module(model, mesh, interop.fsdp(min_size=1))
        twice_negated()
        assert model.weight.jax().sharding == model.weight._s.sharding and model.weight.jax().sharding.mesh.size == n
        torch.testing.assert_close(forward(interop.shard_batch(x.cpu(), mesh)).detach().cpu(), want)


# Born on the mesh -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.raw = nn.Parameter(torch.empty(4, 4))
        self.out.weight = self.embed.weight
        self.register_buffer("table", torch.arange(8.0))


def test_deferred_init_makes_the_same_values_on_the_mesh(jax_devices):
    mesh = interop.make_mesh(data=4)
    torch.manual_seed(3)
    model = interop.deferred_init(Net, mesh, interop.fsdp(min_size=64))
    after = torch.rand(2, device="jax").cpu()
    torch.manual_seed(3)
    with torch.device("jax"):
        want = Net()
    assert torch.rand(2, device="jax").cpu().equal(after), "the random numbers go on as after an ordinary init"
    assert model.out.weight is model.embed.weight and isinstance(model.embed.weight, nn.Parameter)
    for (name, got), (_, other) in zip(model.state_dict().items(), want.state_dict().items(), strict=True):
        torch.testing.assert_close(got.cpu(), other.cpu(), msg=name)
    assert model.embed.weight.jax().sharding == NamedSharding(mesh, P("data", None))
    assert max(s.data.nbytes for s in model.embed.weight.jax().addressable_shards) == 16 * 8 * 4 // 4
    with pytest.raises(ValueError, match="device meta"):
        interop.deferred_init(lambda: nn.Linear(2, 2, device="meta"), mesh, interop.data_parallel())
    with pytest.raises(ValueError, match="matches no parameter"):
        interop.deferred_init(Net, mesh, {"nothing": "data"})


def test_deferred_init_allocates_no_whole_parameter():
    out = run_python(
        "import resource, torch, torchax\n"
        "from torchax import interop\n"
        "mesh = interop.make_mesh(data=4)\n"
        "interop.deferred_init(lambda: torch.nn.Linear(8, 8), mesh, interop.fsdp(min_size=1))\n"
        "import jax; seen = []\n"
        "put = jax.device_put\n"
        "jax.device_put = lambda x, *a, **k: (seen.append(getattr(x, 'nbytes', 0)), put(x, *a, **k))[1]\n"
        "model = interop.deferred_init(lambda: torch.nn.Linear(1024, 1024), mesh, interop.fsdp())\n"
        "print(max(seen, default=0), max(interop.bytes_per_device(model).values()))\n"
    )
    moved, held = map(int, out.split())
    assert moved < 10_000 and held == 1024 * 1024 + 1024


def test_shard_map_runs_a_torch_function_on_each_part():
    mesh = interop.make_mesh(data=4)
    x = torch.arange(8.0, device="jax").reshape(8, 1).requires_grad_()

    def local(t):
        assert t.shape == (2, 1)
        return torchax.interop.call_jax(lambda a: jax.lax.psum(a, "data"), t * 2)

    total = interop.jax_shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P())
    assert total(x).tolist() == [[24.0], [32.0]]
    per_part = interop.jax_shard_map(lambda t: t - t.mean(), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert per_part(x).flatten().tolist() == [-0.5, 0.5] * 4
    (per_part(x) ** 2).sum().backward()
    assert x.grad.flatten().tolist() == [-1.0, 1.0] * 4
    with pytest.raises(ValueError):
        interop.jax_shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P())(torch.ones(6, 1, device="jax"))
