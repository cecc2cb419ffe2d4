"""`torchax.config`: debug mode, NaN checks, the CPU fallback, and settings that do not exist."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import pytest
import torch
import torchax
from torchax import _missing, errors, plugins
from torchax._registry import Lowering

from helpers import assert_same


@pytest.fixture
def failing():
    """Ops whose lowerings fail: at once, and only when the values are computed."""
    lib = torch.library.Library("torchax_failing", "DEF")
    lib.define("shape(Tensor x) -> Tensor")
    lib.define("wrong(Tensor x) -> Tensor")
    lib.define("late(Tensor x) -> Tensor")
    for name in ("shape", "wrong", "late"):
        lib.impl(name, lambda x: torch.empty_like(x), "Meta")

    def late(x):
        import jax

        def fail(v):
            raise ValueError("from the device")

        return jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    class Plugin:
        @plugins.hookimpl
        def torchax_register_ops(self, registry):
            registry.add(Lowering(op="torchax_failing::shape", fn=lambda x: jnp.dot(x, jnp.ones(77))))
            registry.add(Lowering(op="torchax_failing::wrong", fn=lambda x: x[:1]))
            registry.add(Lowering(op="torchax_failing::late", fn=late))

    plugins.register(Plugin(), "failing")
    yield torch.ops.torchax_failing
    plugins.disable("failing")
    plugins._found.pop("failing")
    lib._destroy()


@pytest.mark.parametrize("mode", ["strict", "debug"])
def test_a_failing_lowering_is_named_with_the_users_line(failing, mode):
    x = torch.ones(3, device="jax")
    with torchax.config.override(eager=mode):
        with pytest.raises(errors.LoweringError) as caught:
            failing.shape(x)
        text = str(caught.value)
        assert "torchax_failing::shape" in text and "test_debug_mode.py" in text and "float32[3]" in text
        with pytest.raises(errors.LoweringError, match=r"plugin 'failing' gave shape \[1\] where torch gives \[3\]"):
            failing.wrong(x)
    assert x.tolist() == [1, 1, 1] and torchax.config.eager == "strict"


def test_debug_mode_names_the_op_that_failed_on_the_device(failing):
    x = torch.ones(3, device="jax")
    with (
        torchax.config.override(eager="debug"),
        pytest.raises(errors.LoweringError, match=r"torchax_failing::late.*test_debug_mode"),
    ):
        failing.late(x)
    assert (x + 1).tolist() == [2, 2, 2]


def test_debug_mode_computes_the_same():
    def program():
        torch.manual_seed(0)
        m = torch.nn.Linear(3, 2).to("jax")
        x = torch.ones(2, 3, device="jax")
        x[0] *= 2
        m(x).relu().sum().backward()
        return m.weight.grad.cpu()

    want = program()
    with torchax.config.override(eager="debug", nan_check=True):
        assert torch.equal(program(), want)


def test_nan_check_names_the_op_and_the_line():
    x = torch.tensor([1.0, -1.0], device="jax")
    with torchax.config.override(eager="debug", nan_check=True):
        with pytest.raises(errors.NaNFound, match=r"aten::log.*test_debug_mode"):
            x.log()
        nan = torch.tensor([float("nan")], device="jax")
        assert (nan * 2).isnan().all(), "it came in: nobody is to blame"
        assert (x / 0).isinf().all() and torch.full((2,), float("nan"), device="jax").isnan().all()
        with pytest.raises(FloatingPointError):
            (x - x) / (x - x)
    assert x.log().isnan().any() and x.tolist() == [1, -1]


def test_nan_check_in_backward():
    x = torch.zeros(2, device="jax", requires_grad=True)
    with torchax.config.override(eager="debug", nan_check=True), pytest.raises(errors.NaNFound):
        (x.sqrt() * 0.0).sum().backward()
    assert x.grad is None


# Settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_checked():
    with pytest.raises(AttributeError, match=r"no setting 'eagre'; it has .*eager"):
        torchax.config.eagre = "debug"
    with pytest.raises(AttributeError, match="no setting"):
        _ = torchax.config.nonsense
    with pytest.raises(ValueError, match=r"'strict', 'debug'; got 'fast'"):
        torchax.config.eager = "fast"
    with pytest.raises(ValueError, match="must be one of"), torchax.config.override(fallback="cpu", eager="fast"):
        pass
    assert torchax.config.fallback == "error" and torchax.config.eager == "strict"
    with pytest.raises(ZeroDivisionError), torchax.config.override(fallback="cpu"):
        assert torchax.config.fallback == "cpu"
        raise ZeroDivisionError
    assert torchax.config.fallback == "error"


def test_declared_settings_and_listeners():
    config = torchax.config
    config.declare("test_option", 1, choices=(1, 2), doc="for this test")
    heard = []
    config.on_change("test_option", heard.append)
    try:
        config.test_option = 2
        config.declare("test_option", 1)
        assert config.test_option == 2 and heard == [2] and config.options()["test_option"].doc == "for this test"

        def refuse(value):
            raise RuntimeError("no")

        config.on_change("test_option", refuse)
        with pytest.raises(RuntimeError):
            config.test_option = 1
        assert config.test_option == 2
    finally:
        config._options.pop("test_option")


# The CPU fallback -------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu():
    """Ops of a library of their own, with CPU kernels and nothing else."""
    lib = torch.library.Library("torchax_fallback", "DEF")
    lib.define("triple(Tensor x) -> Tensor")
    lib.define("triple_(Tensor(a!) x) -> Tensor(a!)")
    lib.define("first(Tensor(a) x) -> Tensor(a)")
    lib.define("pair(Tensor x, Tensor[] ys) -> (Tensor, Tensor[])")
    lib.impl("triple", lambda x: x * 3, "CPU")
    lib.impl("triple_", lambda x: x.mul_(3), "CPU")
    lib.impl("first", lambda x: x[0], "CPU")
    lib.impl("pair", lambda x, ys: (x + 1, [y * 2 for y in ys]), "CPU")
    _missing.SERVED.clear()
    _missing._warned.clear()
    with torchax.config.override(fallback="cpu"):
        yield torch.ops.torchax_fallback
    _missing.SERVED.clear()
    _missing._warned.clear()
    lib._destroy()


@pytest.mark.filterwarnings("ignore:.*runs on CPU.*")
def test_the_fallback_serves_any_op(on_cpu):
    x = torch.arange(6.0, device="jax").reshape(2, 3)
    assert_same(on_cpu.triple(x.t()), torch.arange(6.0).reshape(2, 3).t() * 3)
    a, bs = on_cpu.pair(x, [x, x[0]])
    assert a.device.type == "jax" and bs[1].tolist() == [0, 2, 4]
    y = x[1]
    assert on_cpu.triple_(y) is y and x.tolist() == [[0, 1, 2], [9, 12, 15]], "written back, through the view"
    view = on_cpu.first(x)
    view.fill_(7)
    assert x[0].tolist() == [7, 7, 7], "views stay views"
    assert _missing.SERVED == {  # an in-place op is served by its functional form
        "torchax_fallback::triple": 2,
        "torchax_fallback::pair": 1,
        "torchax_fallback::first": 1,
    }
    device1 = on_cpu.triple(torch.ones(2, device="jax:1"))
    assert device1.device == torch.device("jax:1") and device1.tolist() == [3, 3]


def test_the_fallback_warns_once_per_op(on_cpu):
    x = torch.ones(2, device="jax")
    with pytest.warns(RuntimeWarning, match="torchax_fallback::triple has no lowering and runs on CPU"):
        on_cpu.triple(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_cpu.triple(x)
    assert _missing.SERVED["torchax_fallback::triple"] == 2


def test_the_fallback_is_off_by_default_and_switches_at_once(on_cpu):
    x = torch.ones(2, device="jax")
    with torchax.config.override(fallback="error"), pytest.raises(errors.OperatorNotFound):
        on_cpu.triple(x)
    with pytest.warns(RuntimeWarning):
        assert on_cpu.triple(x).tolist() == [3, 3]
    with torchax.config.override(fallback="error"), pytest.raises(errors.OperatorNotFound):
        on_cpu.triple(x)
