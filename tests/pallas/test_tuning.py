"""Block sizes: which table a look-up asks first, the user's file, and tuning with a timer of our own, since there is no TPU."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torchax

pytest.importorskip("torchax_ops_pallas")
from torchax_ops_pallas import autotune, reference, tuning, user_table
from torchax_ops_pallas.blocks import Blocks, Tiles, attention_blocks, product_tiles, trying

from tpu_programs import chip

_KIND = "TPU v5 lite"
_SIZES = (4096, 2048, 1024)


@pytest.fixture(autouse=True)
def table(tmp_path):
    """An empty user's table."""
    path = tmp_path / "deep" / "blocks.json"
    with torchax.config.override(pallas_table=path):
        yield path


def _tiles(sizes=_SIZES, dtype="bfloat16", kind=_KIND):
    return product_tiles("grouped_outer", sizes, dtype, kind)


def test_the_users_table_is_asked_before_that_of_the_package(table):
    built_in, own = _tiles(), Tiles(128, 256, 384)
    assert own != built_in
    assert user_table.save(_KIND, "grouped_outer", _SIZES, "bfloat16", dataclasses.asdict(own), 1e-3) == table
    assert _tiles() == own
    assert _tiles((4000, 1500, 600)) == own  # rounded up to powers of two, these are the same
    for other in ({"sizes": (4000, 1000, 600)}, {"dtype": "float32"}, {"kind": "TPU v6 lite"}):
        given = {"sizes": _SIZES, "dtype": "bfloat16", "kind": _KIND, **other}
        assert _tiles(**given) == product_tiles("grouped_outer", *given.values(), own=False) != own
    with trying("grouped_outer", Tiles(256, 128, 128)):
        assert _tiles() == Tiles(256, 128, 128)
    other = Tiles(512, 512, 256)
    user_table.save(_KIND, "grouped_outer", _SIZES, "bfloat16", dataclasses.asdict(other), 1e-3)
    user_table.save(_KIND, "attention", (1000, 1000, 128), "any", dataclasses.asdict(Blocks(1024, 256, 128, 128)), 1e-3)
    assert _tiles() == other and len(json.loads(table.read_text())["entries"]) == 2
    assert attention_blocks(1000, 900, 128, _KIND) == Blocks(1024, 256, 128, 128)
    assert attention_blocks(1000, 900, 128, _KIND, own=False) == Blocks(512, 512, 256, 512)
    assert not [p for p in table.parent.iterdir() if p != table]


_ENTRY = {"kind": _KIND, "kernel": "grouped_outer", "sizes": [4096, 2048, 1024], "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[]", "format"),
        ('{"format": 7, "entries": []}', "format"),
        (json.dumps({"format": 1, "entries": [{"kind": 1}]}), "entry 0 must have"),
        (json.dumps({"format": 1, "entries": [{**_ENTRY, "blocks": {"rows": 100}}]}), "multiples of 128"),
        (json.dumps({"format": 1, "entries": [{**_ENTRY, "blocks": 3}]}), "object of blocks"),
        ("\xff", "utf-8"),
    ],
)
def test_a_broken_file_is_said_to_be_so_and_ignored(table, text, words):
    expected = product_tiles("grouped_outer", _SIZES, "bfloat16", _KIND, own=False)
    table.parent.mkdir()
    table.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match=f"(?s)blocks.json: not a table of block sizes.*{words}.*torchax-ops tune"):
        assert _tiles() == expected
    assert _tiles() == expected  # said once
    with pytest.raises(ValueError):
        user_table.save(_KIND, "grouped_outer", _SIZES, "bfloat16", {"rows": 128}, 1.0)
    assert table.read_bytes() == text.encode("latin-1")


def test_blocks_of_other_names_are_ignored():
    expected = _tiles()
    user_table.save(_KIND, "grouped_outer", _SIZES, "bfloat16", {"depth": 128}, 1e-3)
    assert _tiles() == expected


def test_where_the_file_is(monkeypatch, tmp_path):
    from torchax_ops_pallas.settings import table_path

    with torchax.config.override(pallas_table=None):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert table_path() == tmp_path / "torchax" / "pallas-blocks.json"
        monkeypatch.setenv("TORCHAX_PALLAS_TABLE", os.fspath(tmp_path / "mine.json"))
        assert table_path() == tmp_path / "mine.json"
        with torchax.config.override(pallas_table=tmp_path / "chosen.json"):
            assert table_path() == tmp_path / "chosen.json"


def test_tuning_with_kernels_in_the_interpreter(table):
    """The whole way: candidates, programs that run, the fastest written, and found by the next look-up."""
    cpu, sizes, seen = jax.devices()[0], (256, 130, 256), []

    def timer(compiled, operands):
        out = compiled(*operands)
        ends = jnp.asarray([32 * (i + 1) for i in range(8)])
        x, y = (operand.astype(jnp.float32) for operand in operands)
        expected = reference.grouped_outer(x, y, ends)
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
        seen.append(len(seen))
        return 1.0 / len(seen)  # the last one is the fastest

    found = autotune("grouped_outer", sizes, "float32", device=cpu, timer=timer)
    assert len(found.trials) == len(seen) == len({t.blocks for t in found.trials}) == 8
    assert found.best == found.trials[-1] != found.trials[0]
    assert found.trials[0].blocks == product_tiles("grouped_outer", sizes, "float32", cpu.device_kind, own=False)
    assert found.path == table and json.loads(table.read_text())["entries"][0]["seconds"] == found.best.seconds
    assert product_tiles("grouped_outer", sizes, "float32", cpu.device_kind) == found.best.blocks


def test_attention_is_tuned_in_two_rounds(monkeypatch):
    monkeypatch.setattr(
        tuning, "_try", lambda *a: tuning.Trial(a[2], 1.0 + abs(a[2].keys - 256) + abs(a[2].backward_keys - 512))
    )
    found = autotune("attention", (1024, 1024, 64), device=jax.devices()[0], save=False)
    assert (found.best.blocks.keys, found.best.blocks.backward_keys) == (256, 512)
    assert found.path is None and len(found.trials) < 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("grouped", (1, 2, 3)), "no kernel 'grouped'.*grouped_outer"),
        (("attention", (1, 2)), "length, keys, features"),
        (("attention", (1, 2, 0)), "positive"),
        (("attention", (64, 64, 64), "int8"), "bfloat16 or float32"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        autotune(*arguments)


def test_without_a_tpu_nothing_is_timed():
    with pytest.raises(tuning.NoTPU, match="timing kernels on a TPU"):
        autotune("attention", (64, 64, 64))


@pytest.mark.tpu_aot
def test_what_the_tpu_compiler_refuses_is_passed_over(monkeypatch):
    device = chip("v5e:2x2").devices.flat[0]
    large = [Tiles(128, 2048, 2048), Tiles(256, 256, 256)]
    tunable = tuning.KERNELS["grouped_outer"]._replace(rounds=(lambda best, sizes: large,))
    monkeypatch.setitem(tuning.KERNELS, "grouped_outer", tunable)
    found = autotune("grouped_outer", (2048, 4096, 2048), device=device, timer=lambda *_: 1.0)
    table, refused, small = found.trials
    assert table.seconds == small.seconds == 1.0
    assert refused.seconds is None and "vmem" in (refused.refusal or "").lower()
