"""The fixtures that all tests lean on do what they say."""

from __future__ import annotations

import jax
import pytest
import torch
import torchax

from helpers import assert_same


def test_compile_counter(compile_counter) -> None:
    x = torch.rand(7, 5, device="jax")
    (x * 2).sum().item()
    assert compile_counter.count > 0
    with compile_counter.expect(0):
        (x * 2).sum().item()
    with pytest.raises(AssertionError, match="expected 0"), compile_counter.expect(0):
        jax.jit(lambda a: a - 3)(1.0)


def test_pair(pair) -> None:
    cpu, other = pair(2, 3, requires_grad=True)
    assert cpu.is_leaf and other.is_leaf and other.requires_grad
    assert_same(other, cpu)
    (cpu * cpu).sum().backward()
    (other * other).sum().backward()
    assert_same({"g": [other.grad]}, {"g": [cpu.grad]})
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.float64, torch.complex64):
        assert_same(*pair(4, dtype=dtype)[::-1])
    with pytest.raises(AssertionError):
        assert_same(other + 1, cpu)


def test_config_is_put_back(config) -> None:
    with pytest.raises(AttributeError):
        config.no_such_setting = 1
    config.fallback = "cpu"


def test_config_was_put_back() -> None:
    assert torchax.config.fallback == "error"


def test_environment(jax_devices) -> None:
    assert jax_devices[0].platform == "cpu" and torch.jax.device_count() == len(jax_devices)
