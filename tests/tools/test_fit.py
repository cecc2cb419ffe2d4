"""The command `torchax-ops fit`."""

import functools
import json

import pytest
from torchax_tools import cli
from typer.testing import CliRunner

from commands import run

_MODELS = """
import sys
import torch

def mlp():
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8)), (torch.empty(4, 64),)

def large():
    return torch.nn.Linear(65536, 131072, bias=False), (torch.empty(4, 65536),)

def function():
    return (lambda x: x @ x), (torch.empty(8, 8),)

def broken():
    raise OSError("no disk")

def prints():
    print("loading")
    return function()

def identity():
    return torch.nn.ReLU(), (torch.empty(4, 8),)

def leaves():
    return (lambda x: sys.exit(5)), (torch.empty(4, 8),)

nothing = 3
"""


@pytest.fixture(autouse=True)
def _models(tmp_path, monkeypatch):
    (tmp_path / "fit_models.py").write_text(_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


_fit = functools.partial(run, "fit")


@pytest.mark.tpu_aot
def test_a_report():
    pytest.importorskip("libtpu")
    text = _fit("fit_models:mlp", "--batch", "8", "--shard", "fsdp")
    assert "v5e:2x2, data=4: fits" in text and "a bound, not a prediction" in text and "all-gather" in text
    found = json.loads(_fit("fit_models:mlp", "--batch", "8", "--inference", "--format", "json"))
    assert (
        found["fits"] and found["collectives"] == [] and found["chip"] == "v5e" and found["program"] == "fit_models:mlp"
    )
    assert found["state_bytes"] == (64 * 128 + 128 + 128 * 8 + 8) * 4
    half = json.loads(_fit("fit_models:mlp", "--inference", "--dtype", "bfloat16", "--format", "json"))
    assert half["state_bytes"] == found["state_bytes"] // 2
    assert "fits" in _fit("fit_models:function", "--mesh", "data=2")
    printing = CliRunner().invoke(cli.app, ["fit", "fit_models:prints", "--mesh", "data=2", "--format", "json"])
    assert json.loads(printing.stdout)["fits"] and "loading" in printing.stderr


@pytest.mark.tpu_aot
def test_what_does_not_fit_exits_with_1():
    pytest.importorskip("libtpu")
    text = _fit("fit_models:large", "--inference", code=1)
    assert "does not fit" in text and "8 chips would be the least" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit_models:nothing"], "not callable"),
        (["fit_models:absent"], "no attribute 'absent'"),
        (["no_such_module:make"], "no module 'no_such_module'"),
        (["fit_models:broken"], "OSError: no disk"),
        (["fit_models:mlp", "--topology", "v9:2x2"], "no TPU topology 'v9:2x2'"),
        (["fit_models:mlp", "--mesh", "data"], "write the sizes of axes"),
        (["fit_models:mlp", "--mesh", "data=2,data=4"], "each once"),
        (["fit_models:identity"], "ReLU has no parameters to train; --inference"),
        (["fit_models:mlp", "--shard", "all"], "one of data, fsdp, tensor, fsdp+tensor"),
        (["fit_models:mlp", "--optimizer", "lion"], "one of adamw, adam, sgd"),
        (["fit_models:mlp", "--dtype", "float7"], "no dtype 'float7'"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, message):
    assert message in " ".join(_fit(*arguments, code=2).split())


@pytest.mark.tpu_aot
def test_layouts_that_do_not_fit_the_model_exit_with_2():
    pytest.importorskip("libtpu")
    assert "cannot be divided evenly" in _fit("fit_models:mlp", "--batch", "7", code=2)
    assert "mesh axes ['model']" in _fit("fit_models:mlp", "--shard", "tensor", code=2)
    assert "the step cannot be compiled: SystemExit: 5" in _fit("fit_models:leaves", code=2)
    assert "no TPU topology 'v5e:3x3'" in _fit("fit_models:mlp", "--topology", "v5e:3x3", code=2)
