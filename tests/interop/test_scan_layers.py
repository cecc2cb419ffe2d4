"""`scan_layers`: the numbers of layers one after the other, their checkpoints, and a program that does not grow with depth."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import pytest
import torch
import torch.nn as nn
import torchax
import transformers
from torchax.interop import jax_view, scan_layers


class Block(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, *, shift: Any = None) -> torch.Tensor:
        return x + self.drop(torch.relu(self.norm(self.linear(x)))) * scale + shift


class Net(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(depth)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, scale, shift=scale * 2)
        return self.head(x)


def pair_of_nets(depth: int = 3, **options: Any) -> tuple[Net, Any]:
    torch.manual_seed(0)
    net = Net(depth).to("jax")
    scanned = copy.deepcopy(net)
    scanned.layers = scan_layers(scanned.layers, **options)
    return net, scanned


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("remat", [False, True, jax.checkpoint_policies.dots_saveable], ids=["keep", "remat", "policy"])
def test_values_gradients_buffers_and_random_numbers(remat: Any, compiled: bool) -> None:
    net, scanned = pair_of_nets(remat=remat)
    calls = [torchax.compile(net), torchax.compile(scanned)] if compiled else [net, scanned]
    x = torch.randn(6, 8, device="jax")
    scale = torch.tensor(0.7, device="jax", requires_grad=True)
    for _ in range(2):
        found = []
        for call, module in zip(calls, (net, scanned), strict=True):
            module.zero_grad()
            scale.grad = None
            torch.manual_seed(5)
            y = call(x, scale)
            y.square().sum().backward()
            found.append((y.detach(), scale.grad, torch.rand(2, device="jax")))
        torch.testing.assert_close(*found)
        torch.testing.assert_close(
            torch.stack([b.linear.weight.grad for b in net.layers]), scanned.layers.stack.linear.weight.grad
        )
    assert list(net.state_dict()) == list(scanned.state_dict())
    for name, t in net.state_dict().items():
        torch.testing.assert_close(scanned.state_dict()[name], t)


def test_training_steps() -> None:
    net, scanned = pair_of_nets()
    x, scale = torch.randn(6, 8, device="jax"), torch.tensor(0.7, device="jax")
    losses = []
    for module in (net, scanned):
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)

        @torchax.compile
        def step(x: torch.Tensor, module: Any = module, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = module(x, scale).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        torch.manual_seed(1)
        losses.append([step(x).item() for _ in range(4)])
        assert step.cache_info().misses == 2
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_checkpoints_know_the_layers() -> None:
    net, scanned = pair_of_nets()
    other = Net(3)
    scanned.load_state_dict(other.state_dict())
    net.load_state_dict(scanned.state_dict())
    torch.testing.assert_close(net.layers[1].linear.weight.cpu(), other.layers[1].linear.weight)
    again = pickle.loads(pickle.dumps(copy.deepcopy(scanned)))
    again.load_state_dict(Net(3).state_dict())
    torch.testing.assert_close(scanned.state_dict()["layers.2.linear.bias"].cpu(), other.layers[2].linear.bias.detach())
    broken = dict(other.state_dict())
    del broken["layers.1.linear.bias"]
    broken["layers.2.linear.weight"] = torch.zeros(3)
    with pytest.raises(RuntimeError) as caught:
        scanned.load_state_dict(broken)
    assert 'Missing key(s) in state_dict: "layers.1.linear.bias"' in str(caught.value)
    assert "size mismatch for layers.2.linear.weight" in str(caught.value) and "stack" not in str(caught.value)
    assert list(broken) == [k for k in other.state_dict() if k != "layers.1.linear.bias"]


def test_as_a_list() -> None:
    net, scanned = pair_of_nets()
    layers = scanned.layers
    assert len(layers) == 3 and list(layers) == [layers] and layers[:3] is layers
    torch.testing.assert_close(layers[1].linear.weight, net.layers[1].linear.weight)
    with pytest.raises(ValueError, match="leaves some out"):
        layers[:2]
    with pytest.raises(IndexError, match="3 layers"):
        layers[3]
    net.eval()
    scanned.eval()
    x, scale = torch.randn(2, 8), torch.tensor(0.5)
    torch.testing.assert_close(scanned.cpu()(x, scale), net.cpu()(x, scale))


def _size(jaxpr: Any) -> int:
    inner = lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
    total = 0
    for e in jaxpr.eqns:
        values = jax.tree.leaves(list(e.params.values()), is_leaf=inner)
        total += 1 + sum(_size(getattr(v, "jaxpr", v)) for v in values if inner(v))
    return total


def test_the_program_does_not_grow_with_depth() -> None:
    sizes = {}
    for depth in (2, 8):
        for module in pair_of_nets(depth):
            module.eval()
            fn = jax_view(lambda x, s, module=module: module(x, s))
            scan = not isinstance(module.layers, nn.ModuleList)
            sizes[depth, scan] = _size(jax.make_jaxpr(fn)(jax.numpy.ones((2, 8)), jax.numpy.ones(())).jaxpr)
    assert sizes[2, True] == sizes[8, True] and sizes[8, False] > 2 * sizes[2, False]


def test_parameters_are_kept_once_for_the_backward() -> None:
    _, scanned = pair_of_nets(4)
    scanned.eval()
    fn = torchax.compile(lambda x, s: scanned(x, s))
    fn(torch.randn(2, 8, device="jax"), torch.tensor(0.5, device="jax", requires_grad=True))
    ((program,),) = fn._cache.values()
    outs = [tuple(v.aval.shape) for v in program.halves.forward.outvars]
    assert (4, 8, 8) not in outs, "a copy of the stacked weights"


def test_layers_of_transformers() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=40,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).to("jax")
    scanned = copy.deepcopy(model)
    scanned.model.layers = scan_layers(scanned.model.layers, remat=True)
    assert list(scanned.state_dict()) == list(model.state_dict())
    tokens = torch.randint(0, 40, (2, 7), device="jax")
    losses = [torchax.compile(lambda t, m=m: m(t, labels=t).loss)(tokens) for m in (model, scanned)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(
        torch.stack([m.mlp.up_proj.weight.grad for m in model.model.layers]),
        scanned.model.layers.stack.mlp.up_proj.weight.grad,
        rtol=1e-4,
        atol=1e-6,
    )
    with pytest.raises(TypeError, match="use_cache=False"):
        scanned(tokens, use_cache=True)


def test_layers_that_are_not_identical() -> None:
    for layers, words in (
        ([nn.Linear(2, 2), nn.Linear(2, 3)], "layer 1 is not as layer 0.*parameters"),
        ([nn.Linear(2, 2), nn.Bilinear(2, 2, 2)], "is a Bilinear, not a Linear"),
        ([nn.Dropout(0.1), nn.Dropout(0.2)], "p is 0.2, not 0.1"),
        ([], "at least one"),
    ):
        with pytest.raises(ValueError, match=words):
            scan_layers(layers)
    grows = scan_layers([nn.Linear(2, 3).to("jax")] * 2)
    with pytest.raises(RuntimeError, match=r"scan_layers: .*float32\[2, 2\].*float32\[2, 3\]"):
        grows(torch.ones(2, 2, device="jax"))
