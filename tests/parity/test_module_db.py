"""Every module of PyTorch's own specification against CPU torch: results, gradients, buffers, state_dict."""

import copy
import os
import zlib

import pytest
import torch
import torch.utils._pytree as pytree
import torchax  # noqa: F401
from torch.testing._internal.common_modules import module_db
from torchax.testing import samples

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
DTYPES = (torch.float32, torch.float64) if THOROUGH else (torch.float32,)
PER_MODULE = {True: None, False: None} if THOROUGH else {True: 3, False: 1}  # in training; for evaluation, few differ

# what they drop is drawn at random in training: compared by shape and dtype
DROPPING = {"AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout", "RReLU"}
DROPPING |= {"FractionalMaxPool2d", "FractionalMaxPool3d"}
TOLERANCE = {torch.float32: (1e-4, 2e-5), torch.float64: (1e-7, 1e-9)}


def copied(x, device):
    """A copy of a nest on a device, with leaves of autograd."""

    def moved(t):
        if not isinstance(t, torch.Tensor):
            return t
        return t.detach().clone().to(device).requires_grad_(t.requires_grad)

    return pytree.tree_map(moved, x)


def tensors(x):
    return [t for t in pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


def same(got, want, dtype, values=True):
    got, want = tensors(got), tensors(want)
    assert len(got) == len(want)
    rtol, atol = TOLERANCE[dtype]
    for g, w in zip(got, want, strict=True):
        assert g.device.type == "jax" and g.dtype == w.dtype and g.shape == w.shape
        if values:
            torch.testing.assert_close(g.detach().cpu(), w.detach(), rtol=rtol, atol=atol, equal_nan=True)


def backward(result, seed):
    """Gradients of everything under the result for the same cotangents on every device."""
    outputs = [t for t in tensors(result) if t.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    if outputs:
        torch.autograd.backward(outputs, [c.to(t.dtype).to(t.device) for c, t in zip(cotangents, outputs, strict=True)])


def check(info, item, dtype, training):
    torch.manual_seed(0)
    arguments = item.constructor_input
    module = info.module_cls(*arguments.args, **arguments.kwargs).to(dtype).train(training)
    call = item.forward_input
    args, kwargs = copied((call.args, call.kwargs), "cpu")
    there_args, there_kwargs = copied((call.args, call.kwargs), "jax")
    if info.is_lazy:
        with torch.no_grad():
            module(*args, **kwargs)
    there = copy.deepcopy(module).to("jax")
    assert all(t.device.type == "jax" for t in [*there.parameters(), *there.buffers()])

    values = not (training and info.module_cls.__name__ in DROPPING | {"MultiheadAttention"} and drops(module))
    want, got = module(*args, **kwargs), there(*there_args, **there_kwargs)
    same(got, want, dtype, values)
    backward(want, 1)
    backward(got, 1)
    if values:
        for (name, p), (there_name, q) in zip(module.named_parameters(), there.named_parameters(), strict=True):
            assert name == there_name and (p.grad is None) == (q.grad is None), name
            same([q.grad], [p.grad], dtype)
        for a, b in zip(tensors((args, kwargs)), tensors((there_args, there_kwargs)), strict=True):
            assert (a.grad is None) == (b.grad is None)
            same([b.grad], [a.grad], dtype)
        same(list(there.buffers()), list(module.buffers()), dtype)
    round_trip(module, there, dtype)


def drops(module):
    return getattr(module, "dropout", getattr(module, "p", 1)) != 0


def round_trip(module, there, dtype):
    """A state saved on one device loads on the other."""
    fresh = copy.deepcopy(module)
    for t in [*fresh.parameters(), *fresh.buffers()]:
        t.data = torch.zeros_like(t)
    fresh.load_state_dict(there.state_dict())
    same(list(there.state_dict().values()), list(fresh.state_dict().values()), dtype)
    again = copy.deepcopy(there)
    again.load_state_dict(module.state_dict())
    same(list(again.state_dict().values()), list(module.state_dict().values()), dtype)
    assert list(there.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_module(info, dtype, training):
    if dtype not in info.dtypes:
        pytest.skip("not a dtype of this module")
    torch.manual_seed(zlib.crc32(info.name.encode()))
    items = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    items = [item for item in items if item.forward_input is not None]
    problems = []
    for i in samples.spread(len(items), PER_MODULE[training]):
        try:
            check(info, items[i], dtype, training)
        except Exception as error:
            problems.append(f"{i} {items[i].desc}: {type(error).__name__}: {str(error)[:300]}")
    assert not problems, "\n".join(problems)
