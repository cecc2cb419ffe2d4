"""`torchax.testing` finds what is wrong, and nothing where nothing is."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
import torchax
from hypothesis import given, settings
from torchax import testing
from torchax.hookspecs import hookimpl
from torchax.ops import Lowering, lowering
from torchax.testing import assert_aliasing, assert_parity, assert_same_aliases, opinfo, sample, strategies
from torchax.testing.samples import tensor_to_jax

from helpers import run_python


@pytest.fixture
def lowered():
    """``lowered(op, fn, **attributes)`` lowers an op until the test ends."""

    def load(op, fn, **attributes):
        class Plugin:
            @hookimpl
            def torchax_register_ops(self, registry):
                registry.add(Lowering(op=op, fn=fn, priority=9, **attributes))

        torchax.plugins.register(Plugin(), "tested")

    yield load
    torchax.plugins.disable("tested")
    torchax.plugins._found.pop("tested")
    torchax.plugins._objects.pop("tested")


def test_nothing_but_torchax_is_imported() -> None:
    run_python(
        "import sys, torchax\n"
        "assert 'torchax.testing' not in sys.modules\n"
        "import torchax.testing\n"
        "late = {'hypothesis', 'pytest', 'expecttest', 'torchax_interop'} & set(sys.modules)\n"
        "assert not late, late\n"
        "assert torchax.testing.strategies.tensors and 'hypothesis' in sys.modules\n"
    )


def test_parity_covers_every_form_of_an_operator() -> None:
    x = torch.randn(2, 3)
    done = assert_parity("aten::sigmoid", [x, x.double(), torch.tensor(3)])
    assert done == {
        "forward": 3, "aliasing": 3, "noncontiguous": 3, "inplace": 3, "out": 3, "grad": 2, "jit": 3, "vmap": 3,
    }  # fmt: skip
    done = assert_parity(torch.ops.aten.transpose.int, [(x, 0, 1)], forms=("forward", "view", "jit"))
    assert done == {"forward": 1, "view": 1, "jit": 1}
    assert assert_parity(F.gelu, [sample(x, approximate="tanh")], forms="forward") == {"forward": 1}
    assert assert_parity("aten::mm", [(x, x)], forms="errors") == {"errors": 1}
    assert assert_parity("aten::arange", [sample(5)], forms="forward") == {"forward": 1}


@pytest.mark.parametrize(
    ("fn", "attributes", "form", "said"),
    [
        (lambda x: x * 1.001, {}, "forward", "values differ"),
        (lambda x: x * 1.001, {}, "inplace", "values differ"),
        (lambda x: x * 1.001, {}, "out", "values differ"),
        (lambda x: x * 1.001, {}, "jit", "values differ"),
        (lambda x: x[:, :1], {"meta": False}, "forward", "shape (2, 1) for (2, 3)"),
        (lambda x: jnp.where(x > 1e9, x, 1 / 0), {}, "forward", "ZeroDivisionError"),
    ],
)
def test_parity_finds_a_wrong_lowering(lowered, fn, attributes, form, said) -> None:
    lowered("aten::erf", fn, **attributes)
    with pytest.raises(testing.Mismatch, match="erf differs from CPU") as caught:
        assert_parity("aten::erf", [torch.rand(2, 3) + 1], forms=("forward", form))
    assert f"{form}, sample 0: " in str(caught.value) and said in str(caught.value)


def test_parity_finds_a_wrong_backward(lowered) -> None:
    lowered("aten::sigmoid_backward", lambda g, y: g * y)
    assert_parity("aten::sigmoid", [torch.ones(3)], forms="forward")
    with pytest.raises(testing.Mismatch, match="grad, sample 0: "):
        assert_parity("aten::sigmoid", [torch.ones(3)])


def test_parity_with_a_reference_and_tolerances() -> None:
    x = torch.rand(3)
    near = lambda t: t * 1.001
    assert_parity(near, [x], reference=lambda t: t, tolerances={torch.float32: (1e-2, 0)}, forms="forward")
    with pytest.raises(testing.Mismatch, match="values differ"):
        assert_parity(near, [x], reference=lambda t: t, forms="forward")
    assert assert_parity(torch.rand_like, [x], values=False, forms="forward")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        (("aten::sofplus", [1]), {}, ValueError, "did you mean aten::softplus"),
        (("aten::add", [1]), {}, ValueError, "several overloads; name one of aten::add.Tensor"),
        ((3, [1]), {}, TypeError, "expected an operator, its name or a function"),
        ((F.gelu, []), {}, testing.Mismatch, "no samples"),
        ((F.gelu, [torch.ones(2)]), {"forms": "veiw"}, ValueError, "no form veiw; there are forward"),
        ((F.gelu, [torch.ones(2, device="meta")]), {}, ValueError, "samples are tensors on CPU.* one is on meta"),
        ((F.gelu, [torch.ones(2)]), {"forms": "view"}, testing.Mismatch, "applies to no sample: no result is a view"),
        (
            (torch.mm, [(torch.ones(2), torch.ones(2))]),
            {},
            testing.Mismatch,
            "'forward' applies to no sample: CPU torch",
        ),
        ((F.gelu, [sample]), {"values": True}, testing.Mismatch, "applies to no sample"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, options, error, said) -> None:
    with pytest.raises(error, match=said):
        assert_parity(*arguments, **options)


def test_aliasing() -> None:
    x = torch.rand(2, 3)
    assert_aliasing("aten::view", [(x, (3, 2))])
    assert_aliasing("aten::add_.Tensor", [(x, x.clone())])
    assert_aliasing("aten::sin", [x])
    on_jax = lambda t: t.device.type == "jax"
    for fn, said in (
        (lambda t: t.t().clone() if on_jax(t) else t.t(), r"shares memory with.*\[None\], on CPU \[0\]"),
        (lambda t: t.t() if on_jax(t) else t.t().clone(), r"\[0\], on CPU \[None\]"),
        (lambda t: t.add_(0).sum() if on_jax(t) else t.sum(), r"written \[1\] times, on CPU \[0\]"),
        (lambda t: t.detach() if on_jax(t) else t, "is the same object as"),
        (lambda t: t[:, 1:] if on_jax(t) else t[:, :2], "offset 1"),
    ):
        with pytest.raises(testing.Mismatch, match=said):
            assert_aliasing(fn, [x])
    with pytest.raises(testing.Mismatch, match="nothing was compared"):
        assert_aliasing(torch.mm, [x])


def test_same_aliases() -> None:
    def program(t, copied=False, step=1):
        view = t[::step]
        return [t, view.clone() if copied else view]

    cpu, other = torch.arange(4.0), torch.arange(4.0, device="jax")
    assert_same_aliases(program(other), program(cpu))
    for wrong, said in (
        (program(other, copied=True), "sharing a storage is True on CPU"),
        (program(other, step=2), "geometry"),
        (program(other + 1), "tensor 0: "),
    ):
        with pytest.raises(testing.Mismatch, match=said):
            assert_same_aliases(wrong, program(cpu))
    other.add_(0)
    with pytest.raises(testing.Mismatch, match="version 1 for 0"):
        assert_same_aliases(program(other), program(cpu))


@settings(max_examples=30)
@given(x=strategies.tensors())
def test_strategies_draw_tensors_that_both_devices_can_hold(x) -> None:
    here = x.make()
    assert here.shape == x.shape and here.dtype == x.dtype
    assert_same_aliases([tensor_to_jax(here)], [here])


# OpInfo -----------------------------------------------------------------------------------------------------------


def test_opinfo_of_a_plugin(lowered) -> None:
    lowered("aten::sinc", lambda x: x)
    with pytest.raises(ValueError, match="in these forms and dtypes"):
        opinfo.select("tested", forms=("gradgrad",), dtypes=(torch.float16,))
    cases = opinfo.select("tested", forms=("forward",), dtypes=(torch.float32,))
    assert [c.name for c in cases] == ["sinc/forward/float32"]
    with pytest.raises(testing.Mismatch, match=r"sinc/forward/float32: sample 0: "):
        opinfo.check(cases[0])
    mark = opinfo.parametrize("tested", forms=("forward",), dtypes=(torch.float32,), known={"sinc/*": "shown"})
    (parameter,) = mark.args[1]
    assert parameter.id == "sinc/forward/float32" and parameter.marks[0].name == "xfail"
    for wrong, said in (
        (lambda: opinfo.parametrize("tested", known={"cosc/*": ""}), "matches no case"),
        (lambda: opinfo.select("tested", forms=("vew",)), "no form vew"),
        (lambda: opinfo.select(), "one of them"),
        (lambda: opinfo.select("nobody"), "no plugin 'nobody' is loaded; found: .*aten"),
    ):
        with pytest.raises((ValueError, torchax.errors.PluginError), match=said):
            wrong()


@opinfo.parametrize(infos=opinfo.cases.matching("sinc"), forms=("forward", "grad"), dtypes=(torch.float32,))
def test_opinfo_cases_run(case) -> None:
    assert opinfo.check(case).samples


def test_a_custom_op_of_torch_library(lowered) -> None:
    @torch.library.custom_op("torchax_testing::half_of", mutates_args=())
    def half_of(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    half_of.register_fake(torch.empty_like)

    @lowering("torchax_testing::half_of")
    def fn(x):
        return x / 2

    lowered("torchax_testing::half_of", fn)
    assert assert_parity(half_of, [torch.rand(3)])["forward"] == 1
    assert assert_parity("torchax_testing::half_of", [torch.rand(3)], forms="forward")
