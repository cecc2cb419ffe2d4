"""``repr``, ``print``, ``format`` and everything that turns a tensor into Python values read as PyTorch's."""

from __future__ import annotations

import contextlib
import re

import jax
import pytest
import torch
import torchax


def with_device(text: str, device: str = "jax:0") -> str:
    """What CPU torch prints, with the device put where torch puts it: before size, dtype, grad_fn and requires_grad."""
    suffix = re.search(r"(, |,\n *)(size=|dtype=|grad_fn=|requires_grad=)", text)
    at = suffix.start() if suffix else len(text) - 1
    return f"{text[:at]}, device='{device}'{text[at:]}"


@contextlib.contextmanager
def printoptions(**options):
    before = dict(vars(torch._tensor_str.PRINT_OPTS))
    torch.set_printoptions(**options)
    try:
        yield
    finally:
        vars(torch._tensor_str.PRINT_OPTS).update(before)


TENSORS = {
    "vector": lambda: torch.tensor([1.0, 2.0, 3.5]),
    "ints": lambda: torch.tensor([1, -200, 3]),
    "bools": lambda: torch.tensor([True, False]),
    "scalar": lambda: torch.tensor(2.5),
    "int scalar": lambda: torch.tensor(7),
    "matrix": lambda: torch.arange(6.0).reshape(2, 3) / 7,
    "batch": lambda: torch.arange(24).reshape(2, 3, 4),
    "transposed": lambda: torch.arange(6).reshape(2, 3).t(),
    "slice": lambda: torch.arange(10.0)[2:8:2],
    "empty": lambda: torch.tensor([]),
    "empty int": lambda: torch.tensor([], dtype=torch.int64),
    "empty bool": lambda: torch.tensor([], dtype=torch.bool),
    "empty matrix": lambda: torch.empty(0, 3),
    "empty float64": lambda: torch.empty(2, 0, dtype=torch.float64),
    "float64": lambda: torch.tensor([1.0], dtype=torch.float64),
    "float16": lambda: torch.tensor([1.0, 1e-3], dtype=torch.float16),
    "bfloat16": lambda: torch.tensor([1.0, 3.14159], dtype=torch.bfloat16),
    "float8": lambda: torch.tensor([1.0, 3.5]).to(torch.float8_e4m3fn),
    "int32": lambda: torch.tensor([1, 2], dtype=torch.int32),
    "uint8": lambda: torch.tensor([1, 255], dtype=torch.uint8),
    "complex": lambda: torch.tensor([1 + 2j, -3.5j]),
    "complex128": lambda: torch.tensor([1 + 2j], dtype=torch.complex128),
    "nan and inf": lambda: torch.tensor([float("nan"), float("inf"), -1.0]),
    "large numbers": lambda: torch.tensor([1e10, 1.0, 1e-10]),
    "summarised": lambda: torch.arange(2000.0),
    "summarised matrix": lambda: torch.arange(4000).reshape(40, 100),
    "long line": lambda: torch.arange(100.0),
}


@pytest.mark.parametrize("name", TENSORS)
def test_repr(name):
    cpu = TENSORS[name]()
    for wanted in (with_device(repr(cpu)),):
        x = cpu.to("jax")
        assert repr(x) == str(x) == wanted
        assert f"{x}" == (str(cpu.item()) if x.dim() == 0 else wanted)


def _grad_fns(t):
    return {
        "leaf": t.requires_grad_(),
        "mul": t * 2,
        "view": t.view(-1),
        "sum": t.sum(),
        "select": t[0],
        "detached": t.detach(),
    }


@pytest.mark.parametrize("name", _grad_fns(torch.ones(2)))
def test_repr_of_autograd_tensors(name):
    cpu, x = torch.arange(3.0), torch.arange(3.0).to("jax")
    assert repr(_grad_fns(x)[name]) == with_device(repr(_grad_fns(cpu)[name]))


def test_repr_of_custom_function():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    x = torch.ones(2, requires_grad=True)
    assert repr(Twice.apply(x.detach().to("jax").requires_grad_())) == with_device(repr(Twice.apply(x)))


def test_repr_of_parameters_and_modules():
    p = torch.nn.Parameter(torch.ones(2))
    x = torch.nn.Parameter(torch.ones(2, device="jax"))
    assert repr(x) == "Parameter containing:\n" + with_device(repr(p).split("\n", 1)[1])
    assert repr(torch.nn.Linear(2, 3).to("jax")) == repr(torch.nn.Linear(2, 3))
    assert "torch.float32 of size 2" in repr(torch.nn.ParameterList([x]))


@pytest.mark.parametrize(
    "options",
    [{"precision": 2}, {"sci_mode": True}, {"threshold": 5, "edgeitems": 1}, {"linewidth": 40}, {"profile": "full"}],
    ids=str,
)
def test_printoptions(options):
    cpu = torch.arange(12.0) / 7
    with printoptions(**options):
        assert repr(cpu.to("jax")).replace("\n", "").replace(" ", "") == with_device(repr(cpu)).replace(
            "\n", ""
        ).replace(" ", "")


def test_default_dtype_decides_what_is_named():
    torch.set_default_dtype(torch.float64)
    try:
        for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
            cpu = torch.ones(2, dtype=dtype)
            assert repr(cpu.to("jax")) == with_device(repr(cpu))
    finally:
        torch.set_default_dtype(torch.float32)


def test_other_devices_are_named(jax_devices):
    assert repr(torch.ones(2, device="jax:1")) == "tensor([1., 1.], device='jax:1')"


def test_repr_while_tracing_says_so():
    seen = []

    def f(a):
        seen.append(repr(torchax.tensor.Tensor(a)))
        return a

    jax.jit(f)(jax.numpy.ones((2, 3)))
    assert "float32[2,3]" in seen[0] and "jax:0" in seen[0]


def test_repr_in_vmap_and_inference_mode():
    texts = []
    torch.func.vmap(lambda t: texts.append(repr(t)) or t)(torch.ones(2, 2, device="jax"))
    assert "BatchedTensor" in texts[0] and "jax:0" in texts[0]
    with torch.inference_mode():
        assert repr(torch.ones(2, device="jax")) == "tensor([1., 1.], device='jax:0')"


# Python values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENSORS)
def test_python_values(name):
    cpu = TENSORS[name]()
    x = cpu.to("jax")
    assert str(x.tolist()) == str(cpu.tolist())  # as text, since NaN is not NaN
    assert x.numel() == cpu.numel() and x.dim() == cpu.dim() and x.size() == cpu.size() and x.nbytes == cpu.nbytes
    assert x.element_size() == cpu.element_size() and x.dtype == cpu.dtype
    if cpu.numel() == 1:
        assert x.item() == cpu.item() and type(x.item()) is type(cpu.item())
        assert bool(x) == bool(cpu)
    if cpu.dim():
        assert len(x) == len(cpu) and [str(t.tolist()) for t in x][:3] == [str(t.tolist()) for t in cpu][:3]


def test_numbers():
    x = torch.tensor(2.5, device="jax")
    assert float(x) == 2.5 and int(x) == 2 and complex(x) == 2.5 + 0j and f"{x:.3f}" == "2.500" and round(float(x)) == 2
    assert [10, 20, 30][torch.tensor(1, device="jax")] == 20 and list(range(torch.tensor(3, device="jax"))) == [0, 1, 2]
    assert torch.tensor(3, device="jax").__index__() == 3
    big = torch.tensor(2**62 + 1, device="jax")
    assert big.item() == 2**62 + 1
    assert bool(torch.tensor([0.0], device="jax")) is False and not torch.tensor(False, device="jax")


BAD_NUMBERS = {
    "bool of many": lambda t: bool(t),
    "item of many": lambda t: t.item(),
    "float of many": lambda t: float(t),
    "int of many": lambda t: int(t),
    "index of float": lambda t: [1, 2][t[0]],
    "len of scalar": lambda t: len(t[0]),
    "iter of scalar": lambda t: list(t[0]),
    "format": lambda t: f"{t:.3f}",
    "index of bool": lambda t: [1, 2][t[:1]],
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_errors_are_torchs(name):
    cpu = torch.ones(2)
    with pytest.raises(Exception) as want:
        BAD_NUMBERS[name](cpu)
    with pytest.raises(type(want.value), match=re.escape(str(want.value)).replace("Tensor", ".*")):
        BAD_NUMBERS[name](cpu.to("jax"))


def test_containers():
    x = torch.tensor([1.0, 2.0, 3.0], device="jax")
    assert 2.0 in x and 5 not in x and torch.tensor(3.0, device="jax") in x
    a, b, c = x
    assert (a + b + c).item() == 6
    assert dict.fromkeys([x])[x] is None and hash(x) == id(x)  # by identity, as in PyTorch
    assert [t.item() for t in reversed(x)] == [3, 2, 1]
    assert list(zip(x.tolist(), x, strict=True))[0][1].device.type == "jax"
    assert sum(x).item() == 6 and max(x).item() == 3 and sorted(x, reverse=True)[0].item() == 3
