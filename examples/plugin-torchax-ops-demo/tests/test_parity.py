"""The lowerings compute what CPU torch computes, in all forms; and they are the ones that are taken."""

from __future__ import annotations

import pytest
import torch
import torchax
from hypothesis import given, settings
from torchax.ops import REGISTRY, aten
from torchax.testing import assert_aliasing, assert_parity, opinfo, sample, strategies

from torchax_ops_demo.lowerings import gelu_tanh
from torchax_ops_demo.ops import rms_norm

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm(dtype: torch.dtype) -> None:
    shapes = [(3,), (2, 5), (0, 4), (2, 3, 4)]
    calls = [(torch.randn(shape, dtype=dtype), torch.rand(shape[-1], dtype=dtype)) for shape in shapes]
    forms = ("forward", "aliasing", "noncontiguous", "jit") if dtype.itemsize == 2 else None
    done = assert_parity(rms_norm, calls, forms=forms)
    assert done["forward"] == len(shapes)


@settings(max_examples=20, deadline=None)
@given(x=strategies.tensors((2, 3), dtypes=FLOATS, elements=strategies.small))
def test_rms_norm_of_any_layout(x) -> None:
    assert_parity(rms_norm, [(x, torch.ones(3, dtype=x.dtype), 1e-3)], forms="forward")


def test_gelu() -> None:
    x = torch.randn(4, 5, dtype=torch.float16)
    calls = [sample(x, approximate="tanh"), sample(x), sample(x.float(), approximate="tanh")]
    assert_parity(aten.gelu.default, calls)
    assert_aliasing(aten.gelu.default, calls)


@opinfo.parametrize(plugin="demo", forms=("forward", "grad"), dtypes=(torch.float16, torch.float32))
def test_opinfo(case) -> None:
    opinfo.check(case)


def test_who_serves_gelu(torchax_platform: str) -> None:
    def taken(x: torch.Tensor, **kwargs: str):
        lowering = REGISTRY.resolve(aten.gelu.default, torchax_platform, x.dtype, call=((x,), kwargs))
        assert lowering is not None
        return lowering

    half = torch.ones(2, dtype=torch.float16)
    assert (taken(half, approximate="tanh").fn is gelu_tanh) == (torchax_platform == "cpu")
    assert taken(half).provider == "aten" and taken(half.float(), approximate="tanh").provider == "aten"


def test_the_plugin_is_loaded() -> None:
    (status,) = [s for s in torchax.plugins.status() if s.name == "demo"]
    assert status.state == "loaded" and status.ops == 2, status
