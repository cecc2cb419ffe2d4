"""Lazy modules (``nn.LazyLinear`` and the like): parameters whose shape the first input decides, on device ``jax``."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy
from torchax.tensor import Tensor

from helpers import assert_same

MODULES = {
    "linear": (lambda **k: nn.LazyLinear(4, **k), (2, 3), nn.Linear),
    "conv1d": (lambda **k: nn.LazyConv1d(4, 3, **k), (2, 3, 5), nn.Conv1d),
    "conv2d": (lambda **k: nn.LazyConv2d(4, 3, **k), (2, 3, 5, 5), nn.Conv2d),
    "conv transposed": (lambda **k: nn.LazyConvTranspose2d(4, 3, **k), (2, 3, 5, 5), nn.ConvTranspose2d),
    "batch norm": (lambda **k: nn.LazyBatchNorm2d(**k), (2, 3, 5, 5), nn.BatchNorm2d),
    "instance norm": (lambda **k: nn.LazyInstanceNorm1d(affine=True, **k), (2, 3, 5), nn.InstanceNorm1d),
}


@pytest.mark.parametrize("made", ["there", "on CPU"])
@pytest.mark.parametrize("name", MODULES)
def test_the_first_forward_gives_the_shapes(name, made, pair):
    make, shape, becomes = MODULES[name]
    module = make(device="jax") if made == "there" else make().to("jax")
    uninitialized = [t for t in (*module.parameters(), *module.buffers()) if is_lazy(t)]
    assert uninitialized and all(t.device == torch.device("jax:0") for t in uninitialized)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    want_input, got_input = pair(*shape)
    got = module(got_input)
    assert type(module) is becomes and not any(is_lazy(t) for t in (*module.parameters(), *module.buffers()))
    assert all(type(t) is Tensor for t in (*module.parameters(), *module.buffers()))
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf for p in module.parameters())
    reference = make()
    reference(want_input)
    reference.load_state_dict({k: v.cpu() for k, v in module.state_dict().items()})
    assert_same(module.train()(got_input), reference(want_input), rtol=1e-4, atol=1e-5)
    got.sum().backward()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_an_uninitialized_parameter_is_torchs():
    p = UninitializedParameter(device="jax", dtype=torch.float16)
    assert isinstance(p, UninitializedParameter) and isinstance(p, nn.Parameter) and isinstance(p, Tensor)
    assert p.device.type == "jax" and p.dtype == torch.float16 and p.requires_grad and p.is_leaf
    assert repr(p) == "<UninitializedParameter>"
    with pytest.raises(RuntimeError, match="shape of an uninitialized parameter"):
        _ = p.shape
    for use in (lambda: p + 1, lambda: torch.add(p, p), lambda: p.sum(), lambda: p.view(-1)):
        with pytest.raises(ValueError, match="uninitialized parameter"):
            use()
    before = id(p)
    p.materialize((2, 3))
    assert id(p) == before and type(p) is Tensor and isinstance(p, nn.Parameter) and p.shape == (2, 3)
    assert p.dtype == torch.float16 and p.requires_grad and (p + 1).sum() == 6
    b = UninitializedBuffer(device="jax", persistent=False)
    assert isinstance(b, UninitializedBuffer) and isinstance(b, nn.Buffer) and not b.requires_grad
    b.materialize((2,), dtype=torch.int32)
    assert type(b) is Tensor and b.dtype == torch.int32 and isinstance(b, nn.Buffer)
    assert type(UninitializedParameter()) is UninitializedParameter
    with torch.device("jax"):
        assert UninitializedParameter().device.type == "jax"


def test_lazy_modules_convert_and_move():
    module = nn.Sequential(nn.LazyLinear(4, device="jax:1"), nn.LazyBatchNorm1d(device="jax:1"))
    weight = module[0].weight
    module.half()
    assert is_lazy(module[0].weight) and module[0].weight is weight and weight.dtype == torch.float16
    assert is_lazy(module[1].running_mean) and module[1].running_mean.dtype == torch.float16
    module.to("jax:2")
    assert all(is_lazy(t) and t.device == torch.device("jax:2") for t in (module[0].weight, module[1].running_var))
    module.to("cpu", torch.float32)
    assert all(is_lazy(t) and t.device.type == "cpu" for t in (module[0].weight, module[1].running_var))
    assert module[0].weight is weight and type(weight) is UninitializedParameter
    module.to("jax")
    assert module[0].weight is weight and is_lazy(weight) and weight.device.type == "jax"
    assert module(torch.randn(3, 2, device="jax")).shape == (3, 4)
    assert module[0].weight is weight and weight.shape == (4, 2) and type(weight) is Tensor


def test_state_dicts_of_lazy_modules():
    lazy = nn.LazyLinear(4, device="jax")
    state = lazy.state_dict()
    assert all(is_lazy(v) for v in state.values())
    nn.LazyLinear(4, device="jax").load_state_dict(state)
    full = nn.Linear(3, 4)
    lazy.load_state_dict(full.state_dict())
    assert type(lazy.weight) is Tensor and lazy.weight.device.type == "jax"
    assert_same(lazy.weight, full.weight)
    assert_same(lazy(torch.ones(1, 3, device="jax")), full(torch.ones(1, 3)))


def test_copies_of_lazy_modules():
    lazy = nn.LazyLinear(4, device="jax:1", dtype=torch.float64)
    file = io.BytesIO()
    torch.save(lazy, file)
    file.seek(0)
    for twin in (copy.deepcopy(lazy), torch.load(file, weights_only=False)):
        assert is_lazy(twin.weight) and twin.weight is not lazy.weight
        assert twin.weight.device == torch.device("jax:1") and twin.weight.dtype == torch.float64
        assert twin(torch.ones(2, 3, device="jax:1", dtype=torch.float64)).shape == (2, 4)
    assert is_lazy(lazy.weight)
