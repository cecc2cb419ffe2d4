"""Compiled programs are dropped before the process runs out of memory mappings, in which XLA's compiler would end it."""

import warnings

import pytest
import torch
from torchax._execute import _room


@pytest.mark.parametrize(("held", "drops"), [(76, True), (75, False)])
def test_compiled_programs_are_dropped_in_time(held, drops, tmp_path, monkeypatch):
    mappings, limit = tmp_path / "maps", tmp_path / "max_map_count"
    mappings.write_text("a mapping\n" * held)
    limit.write_text("100\n")
    monkeypatch.setattr(_room, "_EVERY", 1)
    monkeypatch.setattr(_room, "_MAPPINGS", mappings)
    monkeypatch.setattr(_room, "_LIMIT", limit)
    dropped = []
    clear = _room.jax.clear_caches
    monkeypatch.setattr(_room.jax, "clear_caches", lambda: (dropped.append(1), clear()))
    x = torch.arange(7.0, device="jax")
    want = x.cpu().flip(0).cumsum(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(x.flip(0).cumsum(0).cpu(), want)
        _room.make_room()
    assert bool(dropped) is drops
    assert any("memory mappings" in str(w.message) for w in caught) is drops
