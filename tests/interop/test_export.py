"""Exported programs: the same results as torch, for other batch sizes, on other platforms, where there is no torch."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn as nn
import torchax

from helpers import run_python


class Net(nn.Module):
    """Embedding, attention, convolution, norms, factories and sizes as numbers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.conv, self.norm, self.out = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, tokens, scale=None):
        x = self.layer(self.embed(tokens)) + self.shift
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2) + torch.arange(x.shape[1])[None, :, None]
        x = torch.cat([x[:, 1:], x[:, :1]], 1).chunk(2, -1)[0]
        y = self.out(torch.cat([x, x], -1).mean(1)).log_softmax(-1)
        return {"y": y if scale is None else y * scale, "count": tokens.sum() + tokens.shape[0]}


def net():
    torch.manual_seed(0)
    return Net().eval()


def tokens(n):
    return torch.randint(0, 11, (n, 5), generator=torch.Generator().manual_seed(n))


def program(dynamic):
    shapes = ({0: torch.export.Dim("batch", max=64)},) if dynamic else None
    return torch.export.export(net(), (tokens(3),), dynamic_shapes=shapes)


def check(got, want):
    assert set(got) == set(want)
    torch.testing.assert_close(torch.from_numpy(np.array(got["y"])), want["y"].detach())
    assert int(got["count"]) == want["count"].item() and np.asarray(got["count"]).dtype == np.int64


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("weights", ["separate", "inside"])
def test_results_equal_torchs(dynamic, weights):
    exported = torchax.export.export(program(dynamic), weights=weights)
    assert (exported.weights is None) == (weights == "inside")
    for n in (3, 7) if dynamic else (3,):
        check(exported(torchax.convert.t2j(tokens(n))), net()(tokens(n)))
    assert ("tensor<?x5xi64>" in exported.mlir_module()) == dynamic
    if not dynamic:
        with pytest.raises(ValueError, match=r"for the inputs int64\[3, 5\]; it was called with int64\[4, 5\]: "):
            exported(torchax.convert.t2j(tokens(4)))
    else:
        with pytest.raises(ValueError, match="<= 64|64"):
            exported(torchax.convert.t2j(tokens(65)))


def test_tensors_give_tensors_and_modules_are_exported_as_they_are():
    model = net().to("jax")
    exported = torchax.export.export(model, (tokens(3).to("jax"),), {"scale": torch.tensor(2.0)})
    got = exported(tokens(3), scale=torch.tensor(2.0))
    assert isinstance(got["y"], torchax.Tensor) and next(model.parameters()).device.type == "jax"
    torch.testing.assert_close(got["y"].cpu(), net()(tokens(3), 2.0)["y"].detach())


def test_the_function_and_stablehlo_of_an_exported_program():
    weights, fn = torchax.export.exported_program_to_jax(program(False))
    assert set(weights) >= {*dict(net().named_parameters()), "norm.running_mean", "shift"}
    array = torchax.convert.t2j(tokens(3))
    with jax.enable_x64(True):
        check(jax.jit(fn)(weights, (array,)), net()(tokens(3)))
        grad = jax.grad(lambda w: fn({**weights, "out.weight": w}, (array,))["y"][:, 0].sum())(weights["out.weight"])
    assert grad.shape == (3, 8) and jnp.abs(grad).max() > 0
    weights, stablehlo = torchax.export.exported_program_to_stablehlo(program(False))
    assert "stablehlo.dot_general" in stablehlo.mlir_module()
    with jax.enable_x64(True):
        check(stablehlo.call(weights, array), net()(tokens(3)))


WITHOUT_TORCH = """
import sys
for name in ("torch", "torchax", "torchax_interop"):
    sys.modules[name] = None  # importing it raises
import jax, numpy as np
from safetensors.flax import load_file
jax.config.update("jax_enable_x64", True)
folder = sys.argv[1]
program = jax.export.deserialize(bytearray(open(folder + "/program.jaxexport", "rb").read()))
weights = load_file(folder + "/weights.safetensors")
out = program.call(weights, np.load(folder + "/x.npy"))
np.save(folder + "/y.npy", out["y"])
assert not any(m.startswith("torch.") for m in sys.modules)
print(*program.platforms)
"""


def test_saved_programs_run_without_torch_and_on_every_platform(tmp_path):
    exported = torchax.export.export(program(True), platforms=("cpu", "cuda", "tpu"))
    exported.save(tmp_path / "net")
    np.save(tmp_path / "net" / "x.npy", tokens(6).numpy())
    assert run_python("import jax.export\n" + WITHOUT_TORCH, str(tmp_path / "net")).split() == ["cpu", "cuda", "tpu"]
    want = net()(tokens(6))["y"].detach()
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "net" / "y.npy")), want)
    again = torchax.export.load(tmp_path / "net")
    assert again.platforms == ("cpu", "cuda", "tpu") and again.weights.keys() == exported.weights.keys()
    torch.testing.assert_close(again(tokens(6))["y"].cpu(), want)
    assert repr(again).startswith("<Exported for cpu, cuda, tpu: inputs int64[")


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    first, second = (torchax.export.export(nn.Linear(2, n), (torch.ones(1, 2),)) for n in (3, 4))
    first.save(tmp_path / "model")

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.flax.save_file", full)
    with pytest.raises(OSError, match="no space"):
        second.save(tmp_path / "model")
    assert torchax.export.load(tmp_path / "model")(torch.ones(1, 2)).shape == (1, 3)
    assert len(list((tmp_path / "model").iterdir())) == 3
    with pytest.raises(torchax.errors.CheckpointError, match="is a file"):
        second.save(tmp_path / "model" / "about.json")


def test_sizes_without_bounds():
    class Joined(nn.Module):
        def forward(self, x, y):
            return torch.cat([x, y]).reshape(-1, 2, 4).mean(0)

    batch = torch.export.Dim("batch")
    given = (torch.randn(4, 8), torch.randn(4, 8))
    exported = torchax.export.export(Joined(), given, dynamic_shapes=({0: batch}, {0: batch}))
    assert len(exported.inputs) == 2 and exported.inputs[0] == exported.inputs[1] != "float32[4, 8]"
    x, y = torch.randn(700, 8), torch.randn(700, 8)
    torch.testing.assert_close(exported(x, y).cpu(), Joined()(x, y), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"called with float32\[6, 8\], float32\[5, 8\]: .*inconsistency"):
        exported(x[:6], y[:5])


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 2.0))

    def forward(self, x):
        x = torch.cond(x.sum() > 0, lambda x: x * self.weight + torch.arange(8), lambda x: x - 1, (x,))
        _, x = torch.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 1.5), (torch.tensor(0), x))
        carry, ys = torch._higher_order_ops.scan(lambda c, x: (c + x, c * self.weight), x[0], x)
        return carry, ys


def test_control_flow_is_xlas():
    model, x = Branches(), torch.randn(4, 8)
    with torch.no_grad():
        exported = torchax.export.export(torch.export.export(model, (x,)))
        for given in (x.abs(), -x.abs()):
            for got, want in zip(exported(given), model(given), strict=True):
                torch.testing.assert_close(got.cpu(), want)
    assert "stablehlo.case" in exported.mlir_module() and "stablehlo.while" in exported.mlir_module()

    class Sign(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    rows = torch.export.Dim("rows", min=2, max=64)
    with pytest.raises(torchax.errors.LoweringError, match=r"cond .* export the program for fixed shapes"):
        torchax.export.export(Sign(), (x,), dynamic_shapes=({0: rows},))


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_gets_the_lowerings_of_the_platform_that_it_is_for(dynamic):
    pytest.importorskip("torchax_ops_pallas")
    shapes = {"x": {2: torch.export.Dim("length", min=64, max=4096)}} if dynamic else None

    def kernels(*platforms):
        exported = torchax.export.export(
            Attention(), (torch.randn(1, 2, 512, 64),), dynamic_shapes=shapes, platforms=platforms
        )
        return exported.program.mlir_module().count("tpu_custom_call")

    assert (kernels("tpu") > 0) == (not dynamic), "kernels want sizes to be numbers"
    assert kernels("cpu", "tpu") == kernels("cpu") == 0


def test_what_cannot_be_exported_says_so(tmp_path):
    with pytest.raises(TypeError, match=r"torch\.export\.ExportedProgram"):
        torchax.export.exported_program_to_stablehlo(net())
    with pytest.raises(TypeError, match="example inputs"):
        torchax.export.export(net())
    with pytest.raises(TypeError, match="tuple of example inputs.* got Tensor"):
        torchax.export.export(net(), tokens(3))
    with pytest.raises(TypeError, match="takes a torch.nn.Module or an ExportedProgram; got function"):
        torchax.export.export(lambda x: x, (tokens(3),))
    for platforms in ("tpu", ("cpu", "gpux")):
        with pytest.raises(ValueError, match="out of cpu, cuda, rocm, tpu, as in platforms="):
            torchax.export.export(program(False), platforms=platforms)
    with pytest.raises(torchax.errors.CheckpointError, match="it does not exist"):
        torchax.export.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'separate' or 'inside'"):
        torchax.export.export(program(False), weights="both")
    with pytest.raises(torchax.errors.CheckpointError, match="holds no exported program"):
        torchax.export.load(tmp_path)
    (tmp_path / "program.jaxexport").write_bytes(b"nonsense")
    (tmp_path / "about.json").write_text("{}")
    with pytest.raises(torchax.errors.CheckpointError, match="cannot|can be read"):
        torchax.export.load(tmp_path)
    training = torch.export.export(nn.BatchNorm1d(2).train(), (torch.ones(3, 2),))
    weights, fn = torchax.export.exported_program_to_jax(training)
    with pytest.warns(UserWarning, match="updates running_mean"), jax.enable_x64(True):
        jax.jit(fn)(weights, (jnp.ones((3, 2), np.float32),))
    weights, fn = torchax.export.exported_program_to_jax(program(False))
    with pytest.raises(KeyError, match=r"out\.weight"):
        fn({k: w for k, w in weights.items() if k != "out.weight"}, (torchax.convert.t2j(tokens(3)),))
    with pytest.raises(TypeError, match="takes 1 inputs"):
        fn(weights, (1, 2))
