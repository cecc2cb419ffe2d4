"""`torch.set_float32_matmul_precision` decides the precision of products, eagerly and compiled, forward and backward."""

from __future__ import annotations

import jax
import pytest
import torch
import torch.nn.functional as F
from jax.extend.core import jaxprs_in_params
from torchax._dispatch import RULES
from torchax.interop import jax_jit, jax_view

JAX = {"highest": jax.lax.Precision.HIGHEST, "high": jax.lax.Precision.HIGH, "medium": jax.lax.Precision.DEFAULT}


@pytest.fixture(autouse=True)
def _setting():
    yield
    torch.set_float32_matmul_precision("highest")


def _precisions(jaxpr) -> set:
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            precision = eqn.params["precision"]
            found |= set(precision) if isinstance(precision, tuple) else {precision}
        for inner in jaxprs_in_params(eqn.params):
            found |= _precisions(inner)
    return found


def _arrays(*shapes):
    return [jax.numpy.ones(shape) for shape in shapes]


CASES = {
    "matmul": (lambda a, b: a @ b, [(2, 3), (3, 4)]),
    "addmm": (lambda a, b, c: torch.addmm(a, b, c), [(2, 4), (2, 3), (3, 4)]),
    "linear": (lambda x, w, b: F.linear(x, w, b), [(2, 3), (4, 3), (4,)]),
    "conv2d": (lambda x, w: F.conv2d(x, w), [(1, 2, 5, 5), (3, 2, 3, 3)]),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q), [(1, 2, 4, 8)]),
}


@pytest.mark.parametrize("setting", JAX)
@pytest.mark.parametrize("name", CASES)
def test_traced(name, setting):
    fn, shapes = CASES[name]
    torch.set_float32_matmul_precision(setting)
    jaxpr = jax.make_jaxpr(jax_view(fn))(*_arrays(*shapes))
    assert _precisions(jaxpr.jaxpr) == {JAX[setting]}
    grad = jax.make_jaxpr(jax.grad(lambda *a: jax_view(fn)(*a).sum()))(*_arrays(*shapes))
    assert _precisions(grad.jaxpr) == {JAX[setting]}


@pytest.mark.parametrize("name", ["matmul", "linear"])
def test_eager_programs_follow_a_change(name, compile_counter):
    fn, shapes = CASES[name]
    tensors = [torch.ones(shape, device="jax", requires_grad=True) for shape in shapes]

    def run():
        fn(*tensors).sum().backward()

    for setting in JAX:
        torch.set_float32_matmul_precision(setting)
        run()
        rule = RULES[getattr(torch.ops.aten, name).default]
        (entry,) = [entry for key, entry in rule.cache.items() if key[0] == setting and key[1] is tensors[0]._m]
        assert _precisions(jax.make_jaxpr(entry.program.jitted)(*[t.detach().jax() for t in tensors]).jaxpr) == {
            JAX[setting]
        }
    with compile_counter.expect(0):
        for setting in JAX:
            torch.set_float32_matmul_precision(setting)
            run()


def test_compiled_programs_follow_a_change(compile_counter):
    x = torch.ones(4, 4, device="jax")
    step = jax_jit(lambda x: x @ x)
    step(x)
    torch.set_float32_matmul_precision("medium")
    with compile_counter.expect(1):
        step(x)


def test_jaxs_own_setting_wins():
    with jax.default_matmul_precision("high"):
        jaxpr = jax.make_jaxpr(jax_view(torch.mm))(*_arrays((2, 3), (3, 2)))
    assert _precisions(jaxpr.jaxpr) == {JAX["high"]}
