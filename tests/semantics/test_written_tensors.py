"""A tensor to be written that does not fit the result: refused, resized or cast as CPU torch does it, which differs from op to op."""

import warnings

import pytest
import torch


def ones(*shape, device, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=device)


CALLS = {
    "addmm refuses another dtype": lambda f: torch.addmm(f(3, 3), f(3, 3), f(3, 3), out=f(3, 3, dtype=torch.float64)),
    "dot refuses another dtype": lambda f: torch.dot(f(3), f(3), out=f(dtype=torch.float64)),
    "add casts": lambda f: torch.add(f(3), f(3), out=f(3, dtype=torch.float64)),
    "add does not cast to integers": lambda f: torch.add(f(3), f(3), out=f(3, dtype=torch.int64)),
    "add resizes and warns": lambda f: torch.add(f(3), f(3), out=f(4)),
    "addbmm resizes": lambda f: torch.addbmm(f(1), f(2, 5, 3), f(2, 3, 4), out=f(5, 2)),
    "addbmm_ resizes": lambda f: f(1).addbmm_(f(2, 5, 3), f(2, 3, 4)),
    "addr_ refuses": lambda f: f().addr_(f(5), f(3)),
    "cholesky lays out an empty tensor": lambda f: torch.cholesky(torch.diag(f(3)), out=f(0)),
}


def outcome(call, device):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call(lambda *shape, **kw: ones(*shape, device=device, **kw))
        except RuntimeError:
            return "RuntimeError"
    said = any("resized" in str(w.message) for w in caught)
    return said, result.dtype, result.shape, result.stride(), result.tolist()


@pytest.mark.parametrize("name", CALLS)
def test_a_written_tensor_that_does_not_fit(name):
    want = outcome(CALLS[name], "cpu")
    assert outcome(CALLS[name], "jax") == want
    assert outcome(CALLS[name], "jax") == want  # what was found out is kept
