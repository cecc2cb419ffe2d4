"""`torch.compile(backend="torchax")` says why it cannot be, rather than running eagerly."""

from __future__ import annotations

import pathlib
import tomllib
from typing import Any

import pytest
import torch
import torchax  # noqa: F401
from torch._dynamo.backends import registry


def test_the_backend_is_refused_when_it_is_asked_for(monkeypatch: Any) -> None:
    import importlib.metadata

    root = pathlib.Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "packages/torchax-interop/pyproject.toml").read_text())["project"]
    target = project["entry-points"]["torch_dynamo_backends"]["torchax"]
    entry = importlib.metadata.EntryPoint("torchax", target, "torch_dynamo_backends")
    monkeypatch.setitem(registry._BACKENDS, "torchax", entry)
    with pytest.raises(RuntimeError, match=r"Dynamo does not trace.*torchax\.compile"):
        torch.compile(lambda x: x * 2, backend="torchax")


def test_dynamo_still_leaves_the_graph() -> None:
    """If this fails, torch has learnt to trace our tensors, and there may be a way in."""
    asked = []

    def backend(graph: Any, inputs: Any) -> Any:
        asked.append(graph)
        return graph.forward

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: x * 2, backend=backend, fullgraph=True)(torch.ones(2, device="jax"))
    assert not asked
