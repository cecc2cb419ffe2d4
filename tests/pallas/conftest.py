"""What tests of kernels share: nothing said about the division of batches, and meshes of virtual devices."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import pytest
import torchax
from jax.sharding import AxisType, Mesh


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of the process may have said which axes divide batches."""
    monkeypatch.setattr(torchax._sharding, "_batch_axes", {})


@pytest.fixture
def virtual_mesh() -> Callable[..., Mesh]:
    """``virtual_mesh(shape, names)``: a mesh of the virtual devices of the test process."""

    def make(shape: tuple[int, ...], names: tuple[str, ...] = ("data", "model")) -> Mesh:
        if len(jax.devices()) < math.prod(shape):
            pytest.skip("needs several JAX devices; XLA_FLAGS was set from outside")
        return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))

    return make
