"""What goes wrong says so in the user's terms, and leaves everything as it was."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
import torch
import torchax
from torchax import errors
from torchax.tensor import Tensor


@pytest.fixture(scope="module")
def library():
    lib = torch.library.Library("torchax_errors", "DEF")
    lib.define("absent(Tensor x, float k=1.0) -> Tensor")
    lib.define("absent.other(Tensor x, Tensor y) -> Tensor")
    lib.define("absent_(Tensor(a!) x) -> Tensor(a!)")
    yield torch.ops.torchax_errors
    lib._destroy()


def test_a_missing_op_says_what_to_do(library):
    x = torch.ones(2, device="jax")
    with pytest.raises(errors.OperatorNotFound) as caught:
        library.absent(x)
    text = str(caught.value)
    assert isinstance(caught.value, NotImplementedError)
    for part in (
        "torchax_errors::absent",
        "Tensor x, float k=1",
        "Plugins searched: aten",
        "write a lowering",
        "fallback = 'cpu'",
    ):
        assert part in text, text
    with pytest.raises(errors.OperatorNotFound, match=r"torchax_errors::absent\.other"):
        library.absent.other(x, x)
    with pytest.raises(errors.OperatorNotFound):
        library.absent_(x)
    assert x.tolist() == [1, 1] and x._version in (0, 1)


def test_the_nearest_ops_are_named():
    near = torchax._registry.REGISTRY.nearest("aten::relu6_backward_out")
    assert len(near) <= 3
    assert any("softmax" in n for n in torchax._registry.REGISTRY.nearest("aten::_softmaxx"))


BAD = {
    "matmul shapes": lambda d: torch.ones(2, 3, device=d) @ torch.ones(2, 3, device=d),
    "matmul dtypes": lambda d: torch.ones(2, 2, device=d) @ torch.ones(2, 2, dtype=torch.float64, device=d),
    "broadcast": lambda d: torch.ones(2, device=d) + torch.ones(3, device=d),
    "linear": lambda d: torch.nn.functional.linear(torch.ones(2, 3, device=d), torch.ones(4, 2, device=d)),
    "cat": lambda d: torch.cat([torch.ones(2, 2, device=d), torch.ones(2, device=d)]),
    "cat of nothing": lambda d: torch.cat([]),
    "stack": lambda d: torch.stack([torch.ones(2, device=d), torch.ones(3, device=d)]),
    "index": lambda d: torch.ones(2, device=d)[torch.ones(2, device=d)],
    "index dims": lambda d: torch.ones(2, device=d)[0, 0],
    "bool mask": lambda d: torch.ones(2, device=d)[torch.ones(3, dtype=torch.bool, device=d)],
    "embedding index": lambda d: torch.nn.functional.embedding(torch.ones(2, device=d), torch.ones(2, 2, device=d)),
    "softmax dim": lambda d: torch.ones(2, device=d).softmax(3),
    "sum dim": lambda d: torch.ones(2, device=d).sum(2),
    "mean of ints": lambda d: torch.ones(2, dtype=torch.int64, device=d).mean(),
    "max of nothing": lambda d: torch.ones(0, device=d).max(),
    "reshape": lambda d: torch.ones(6, device=d).reshape(4, 2),
    "conv channels": lambda d: torch.nn.functional.conv2d(
        torch.ones(1, 2, 4, 4, device=d), torch.ones(1, 3, 2, 2, device=d)
    ),
    "conv size": lambda d: torch.nn.functional.conv1d(torch.ones(1, 1, 2, device=d), torch.ones(1, 1, 5, device=d)),
    "layer_norm": lambda d: torch.nn.functional.layer_norm(torch.ones(2, 3, device=d), (4,)),
    "bitwise of floats": lambda d: torch.ones(2, device=d) & torch.ones(2, device=d),
    "neg of bool": lambda d: -torch.ones(2, dtype=torch.bool, device=d),
    "sub of bools": lambda d: torch.ones(2, dtype=torch.bool, device=d) - torch.ones(2, dtype=torch.bool, device=d),
    "gather": lambda d: torch.ones(2, 2, device=d).gather(0, torch.ones(2, 2, device=d)),
    "where": lambda d: torch.where(torch.ones(2, device=d), 1.0, torch.ones(2, device=d)),
    "einsum": lambda d: torch.einsum("ij,jk->ik", torch.ones(2, 3, device=d), torch.ones(2, 3, device=d)),
    "cross_entropy": lambda d: torch.nn.functional.cross_entropy(
        torch.ones(2, 3, device=d), torch.zeros(3, dtype=torch.int64, device=d)
    ),
    "arange": lambda d: torch.arange(0, 5, -1, device=d),
    "negative size": lambda d: torch.ones(-1, device=d),
    "eye": lambda d: torch.eye(-1, device=d),
    "full": lambda d: torch.full((2,), "x", device=d),
    "linalg": lambda d: torch.linalg.inv(torch.ones(2, 3, device=d)),
    "bmm": lambda d: torch.bmm(torch.ones(2, 2, device=d), torch.ones(2, 2, device=d)),
    "one_hot": lambda d: torch.nn.functional.one_hot(torch.ones(2, device=d)),
    "topk": lambda d: torch.ones(2, device=d).topk(5),
    "multinomial": lambda d: torch.multinomial(torch.ones(2, device=d), 5),
    "dropout": lambda d: torch.nn.functional.dropout(torch.ones(2, device=d), 2.0),
    "unknown argument": lambda d: torch.ones(2, device=d).sum(dims=0),
    "string": lambda d: torch.ones(2, device=d) + "a",
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_get_torchs_error(name):
    with pytest.raises(Exception) as want:
        BAD[name]("cpu")
    with pytest.raises(type(want.value)) as got:
        BAD[name]("jax")
    normal = lambda e: re.sub(
        r"(?i)jax(:0)?|cpu|lazy|meta", "", re.sub(r"\s+", " ", str(e.value).replace("torch.float32", "float"))
    )[:60]
    assert normal(got) == normal(want)


# Tracing ----------------------------------------------------------------------------------------------------------

NEEDS_VALUES = {
    "numpy": lambda t: t.numpy(), "item": lambda t: t[0].item(), "bool": lambda t: bool(t[0]), "float": lambda t: float(t[0]), "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(), "if": lambda t: 1 if t.sum() > 0 else 2, "array": lambda t: __import__("numpy").asarray(t), "equal": lambda t: torch.equal(t, t),
    "format": lambda t: f"{t[0]:.2f}", "range": lambda t: range(t[0].int()), "contains": lambda t: 5.0 in t,
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDS_VALUES)
def test_values_are_not_there_while_tracing(name):
    def f(a):
        NEEDS_VALUES[name](Tensor(a))
        return a

    with pytest.raises((errors.TracerEscaped, jax.errors.JAXTypeError)) as caught:
        jax.jit(f)(jnp.ones(3))
    assert "trac" in str(caught.value).lower()


@pytest.mark.parametrize(
    "op",
    [lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: t.unique(), lambda t: t.masked_select(t > 0)],
    ids=["mask", "nonzero", "unique", "masked_select"],
)
def test_shapes_that_depend_on_values_are_refused_while_tracing(op):
    assert op(torch.tensor([1.0, -1.0], device="jax")) is not None
    with pytest.raises(errors.DataDependentShape, match="depends on values"):
        jax.jit(lambda a: op(Tensor(a)).jax())(jnp.ones(3))


def test_a_tensor_that_outlives_its_trace():
    kept = []

    def f(a):
        kept.append(Tensor(a) * 2)
        return a

    jax.jit(f)(jnp.ones(3))
    for use in (lambda t: t + 1, lambda t: t.tolist(), lambda t: t.add_(1), lambda t: t[0].item()):
        with pytest.raises((errors.TracerEscaped, jax.errors.UnexpectedTracerError)):
            use(kept[0])
    assert (torch.ones(2, device="jax") + 1).tolist() == [2, 2]
    repr(kept[0])


def test_donated_buffers_are_named():
    x = torch.ones(8, device="jax")
    array = x.jax()
    array.delete()
    with pytest.raises(RuntimeError, match="donated|deleted"):
        x.tolist()


# Devices, layouts, settings ---------------------------------------------------------------------------------------


def test_every_error_of_ours_has_one_base():
    ours = [
        v
        for v in vars(errors).values()
        if isinstance(v, type) and issubclass(v, Exception) and v.__module__ == errors.__name__
    ]
    assert len(ours) >= 10 and all(issubclass(e, errors.TorchaxError) and e.__doc__ for e in ours)


def test_an_array_of_another_platform_is_refused(monkeypatch):
    array = jnp.ones(2)
    monkeypatch.setattr(jax, "local_devices", lambda *a: [])
    with pytest.raises(errors.PlatformUnavailable, match="default platform"):
        Tensor(array)


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = torchax.nonsense
    assert "fallback" in dir(torchax.config)
