"""Steps compiled by the real TPU compiler (libtpu), on a machine without a TPU."""

import contextlib
import functools
import weakref

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn as nn
from torchax import interop
from torchax_interop._fit import collectives_of, kernels_of
from torchax_interop._loops import Loops

from helpers import train_step


def _mlp(device="meta"):
    with torch.device(device):
        return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 256))


_X = torch.empty(64, 256, device="meta")


def _near(found, expected):
    return abs(found - expected) <= 0.03 * expected + 20_000  # vectors are padded to whole tiles


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("rules", "share"), [(None, 1), (interop.fsdp("data"), 4)])
def test_a_train_step_on_meta(rules, share):
    pytest.importorskip("libtpu")
    model = _mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    before = list(model.parameters())
    found = interop.aot_compile(train_step(model, optimizer), (_X,), "v5e:2x2", shardings=rules)
    parameters = sum(p.numel() * 4 for p in before)
    assert found.fits and found.mesh == {"data": 4}
    assert _near(found.state_bytes, 4 * parameters / share)  # with both moments and the gradient
    assert _near(found.argument_bytes, 4 * parameters / share + _X.numel())
    assert _near(found.alias_bytes, 4 * parameters / share)  # the new gradients over the last ones
    assert found.held_bytes == 0
    results = found.output_bytes - found.alias_bytes
    assert found.argument_bytes < found.peak_bytes <= found.argument_bytes + results + found.temporary_bytes
    assert found.total_bytes == found.peak_bytes + found.code_bytes
    assert 0 < found.total_bytes < found.hbm_bytes and found.flops > 6 * 64 * parameters / 4 / 4 * 0.9
    assert found.roofline_seconds == max(found.flops / 197e12, found.bytes_accessed / 819e9)
    sent = {c.kind: c.bytes for c in found.collectives}
    assert ("all-gather" in sent) is (share > 1)
    assert sent.get("all-reduce", 0) + sent.get("reduce-scatter", 0) > 0.9 * parameters
    # everything is as before
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert all(type(p) is nn.Parameter and p.device.type == "meta" and p.grad is None for p in before)
    assert not optimizer.state and not any(m._forward_hooks for m in model.modules())


@pytest.mark.tpu_aot
def test_a_train_step_runs_the_forward_kernel_once():
    pytest.importorskip("libtpu")
    pytest.importorskip("torchax_ops_pallas")

    def step(x):
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return torch.autograd.grad(y.square().sum(), x)

    x = torch.empty(1, 2, 512, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    found = interop.aot_compile(step, (x,), "v5e:2x2", mesh={"data": 1})
    assert len(found.kernels) == 3 and set(found.kernels.values()) == {1}  # forward, dq, dk and dv
    pairs = 512 * 513 // 2  # of a query and a key that it sees: two products forward, three for dq, four for dk and dv
    assert pairs * 2 * 2 * 64 * 9 <= found.flops < 1.1 * pairs * 2 * 2 * 64 * 9


@pytest.mark.tpu_aot
def test_a_model_with_values_and_state_is_left_alone():
    pytest.importorskip("libtpu")
    model = _mlp("cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    step = train_step(model, optimizer)
    step(torch.randn(4, 256))
    everything = [*model.parameters(), *[p.grad for p in model.parameters()]]
    everything += [t for values in optimizer.state.values() for t in values.values()]
    values = [t.detach().clone() for t in everything]
    found = interop.aot_compile(step, (_X,), "v6e:2x2", mesh={"data": 1})
    assert found.fits and found.collectives == ()
    now = [*model.parameters(), *[p.grad for p in model.parameters()]]
    now += [t for values in optimizer.state.values() for t in values.values()]
    assert all(a is b for a, b in zip(everything, now, strict=True))
    torch.testing.assert_close(everything, values, rtol=0, atol=0)
    step(torch.randn(4, 256))


_kept = []


def _raises_with_a_graph_alive(model, x):
    loss = model(x).square().mean()
    raise LookupError(f"mine, of {loss.shape}")


def _keeps_the_graph(model, x):
    loss = model(x).square().mean()
    _kept.append(loss)
    return loss.detach()


def _branches_on_a_value(model, x):
    loss = model(x).square().mean()
    return loss if loss > 1 else -loss


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("body", "error"),
    [(_raises_with_a_graph_alive, LookupError), (_branches_on_a_value, RuntimeError), (_keeps_the_graph, None)],
)
def test_graphs_that_stay_alive_do_not_keep_the_model_abstract(body, error):
    pytest.importorskip("libtpu")
    model = _mlp("cpu").eval()
    before = list(model.parameters())
    values = [p.detach().clone() for p in before]
    watched = weakref.ref(before[0])
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        interop.aot_compile(lambda x: body(model, x), (_X,))
    assert watched() is before[0]
    assert all(a is b and type(a) is nn.Parameter for a, b in zip(before, model.parameters(), strict=True))
    torch.testing.assert_close(before, values, rtol=0, atol=0)
    model(torch.ones(2, 256)).sum().backward()
    torch.testing.assert_close(before[-1].grad, torch.full((256,), 2.0))


@pytest.mark.tpu_aot
def test_a_transformer_uses_the_kernels():
    pytest.importorskip("libtpu")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchax_ops_pallas")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    tokens = torch.empty(4, 512, dtype=torch.int64, device="meta")
    found = interop.aot_compile(model, (tokens,), "v5e:2x2")
    assert any("splash" in name for name in found.kernels) and not found.collectives
    assert _near(found.state_bytes, sum(p.numel() * 2 for p in model.parameters()))


@pytest.mark.tpu_aot
def test_what_does_not_fit():
    pytest.importorskip("libtpu")
    with torch.device("meta"):
        model = nn.Linear(65536, 131072, bias=False)  # 32 GiB
    found = interop.aot_compile(model, (torch.empty(8, 65536, device="meta"),), "v5e:2x2")
    assert not found.fits and found.compiled is None and found.roofline_seconds is None
    assert "memory" in found.problem and "2.0 times" in found.advice[0] and "8 chips" in found.advice[0]
    divided = interop.aot_compile(
        model, (torch.empty(8, 65536, device="meta"),), "v5e:2x2", shardings={"weight": ("data", None)}
    )
    assert divided.fits and divided.argument_bytes >= 2**33


@pytest.mark.tpu_aot
def test_activations_that_do_not_fit():
    pytest.importorskip("libtpu")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1024, 65536), nn.GELU(), nn.Linear(65536, 1024))
    x = torch.empty(131072, 1024, device="meta")
    step = train_step(model, torch.optim.SGD(model.parameters()))
    found = interop.aot_compile(step, (x,), mesh={"data": 1})
    assert not found.fits and "smaller batch" in found.advice[0]
    name, size = next(iter(found.largest.items()))
    assert "float32[131072, 65536] of " in name and size == 131072 * 65536 * 4
    assert list(found.largest.values()) == sorted(found.largest.values(), reverse=True)


@pytest.mark.tpu_aot
def test_gradients_are_held_once_and_unused_parameters_count():
    pytest.importorskip("libtpu")
    with torch.device("meta"):
        model = nn.Linear(32768, 40960, bias=False).bfloat16()  # 2.5 GiB
        unused = nn.Parameter(torch.empty(7 << 29, dtype=torch.bfloat16))  # 7 GiB
    x = torch.empty(8, 32768, device="meta", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    parameters = 2 * 32768 * 40960

    def cleared(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    found = interop.aot_compile(train_step(model, optimizer), (x,), mesh={"data": 1})
    least = interop.aot_compile(cleared, (x,), mesh={"data": 1})
    assert found.held_bytes == least.held_bytes == 0
    assert _near(found.state_bytes, 4 * parameters) and _near(least.state_bytes, 3 * parameters)
    assert found.total_bytes < 4.1 * parameters
    model.unused = unused
    found = interop.aot_compile(train_step(model, optimizer), (x,), mesh={"data": 1})
    assert not found.fits and "does not use elsewhere" in found.advice[0] and "are missing" in found.problem
    assert found.held_bytes == 7 << 30 and found.total_bytes - found.held_bytes < found.hbm_bytes


@pytest.mark.tpu_aot
def test_bad_input():
    pytest.importorskip("libtpu")
    model = _mlp()
    with pytest.raises(ValueError, match=r"no TPU topology 'v5e:3x3'.*v5p:2x2x2"):
        interop.aot_compile(model, (_X,), "v5e:3x3")
    with pytest.raises(ValueError, match=r"no TPU topology 'v1:2x2': its generation is one of v4"):
        interop.aot_compile(model, (_X,), "v1:2x2")
    with pytest.raises(TypeError, match=r"as a tuple; got Tensor: write \(x,\)"):
        interop.aot_compile(model, _X)
    with pytest.raises(TypeError, match="a function or a module; got int"):
        interop.aot_compile(3, (_X,))
    with pytest.raises(ValueError, match="needs 8 devices; there are 4"):
        interop.aot_compile(model, (_X,), mesh={"data": 8})
    with pytest.raises(ValueError, match=r"shape \[6, 256\].*cannot be divided"):
        interop.aot_compile(model, (_X[:6],))
    with pytest.raises(RuntimeError):
        interop.aot_compile(model, (_X[:, :5],))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_loops_count_with_all_their_passes():
    def product(x, _):
        return x @ x, None

    def passes(x, _):
        return jax.lax.scan(product, x, length=5)[0], None

    def until(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 7, lambda x: x @ x, x)

    def loops(function):
        program = jax.jit(function).lower(jnp.ones((64, 64))).compile()
        return Loops(program.as_text() or ""), 2 * 64**3

    nested, product_of_one = loops(lambda x: jax.lax.scan(passes, x, length=3)[0])
    assert sorted(set(nested.times.values()) - {1}) == [3, 15]
    assert _near(nested.later.flops, 14 * product_of_one)
    counted = lambda x: jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 2, c[1] @ c[1]), (0, x))
    assert _near(loops(counted)[0].later.flops, 3 * product_of_one)  # 0, 2, 4, 6
    unknown, _ = loops(until)
    assert unknown.later.flops == 0 and set(unknown.times.values()) == {1}


@pytest.mark.tpu_aot
def test_scanned_layers_work_as_much_as_layers():
    pytest.importorskip("libtpu")

    def compiled(scanned):
        with torch.device("meta"):
            layers = nn.ModuleList(nn.TransformerEncoderLayer(256, 2, 512, 0.0, batch_first=True) for _ in range(3))
        layers = interop.scan_layers(layers) if scanned else layers

        def step(x):
            y = layers(x) if scanned else functools.reduce(lambda y, layer: layer(y), layers, x)
            y.float().square().mean().backward()

        x = torch.empty(4, 512, 256, device="meta")
        return interop.aot_compile(step, (x,), "v5e:2x2", shardings=interop.fsdp())

    loop, flat = compiled(True), compiled(False)
    assert abs(loop.flops / flat.flops - 1) < 0.05
    assert loop.kernels == flat.kernels and set(flat.kernels.values()) == {3}
    moved = lambda found: sum(c.bytes for c in found.collectives)
    assert 0.9 < moved(loop) / moved(flat) < 1.5  # a third of it if a loop's body counted once


def test_collectives_and_kernels_of_a_module():
    text = """\
%all-reduce-scatter.5 (input.5: f32[64,8]) -> f32[16,8] {
  %all-reduce.43 = f32[64,8]{1,0:T(8,128)} all-reduce(%input.5), channel_id=58, to_apply=%add
}
%fused.1 (a: bf16[4]) -> bf16[16] {
  %all-gather.1 = bf16[16]{0} all-gather(%a), channel_id=7, dimensions={0}
}
%fused.2 (a: bf16[4]) -> bf16[16] {
  %all-gather.2 = bf16[16]{0} all-gather(%a), channel_id=7, dimensions={0}
}
ENTRY %main (a: bf16[4]) -> bf16[16] {
  %all-reduce.1 = (f32[3]{0}, pred[5]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %cp = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=2
  %cpd = f32[10]{0} collective-permute-done(%cp)
  %flash.3 = bf16[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  %flash.4 = bf16[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""
    found = {c.kind: (c.count, c.bytes) for c in collectives_of(Loops(text))}
    assert found == {
        "all-gather": (1, 32),
        "all-reduce": (1, 17),
        "collective-permute": (1, 40),
        "reduce-scatter": (1, 2048),
    }
    assert kernels_of(Loops(text)) == {"flash": 2}
