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
    "sum computes in integers": lambda f: torch.sum(f(2, 3).mul(1.6), 1, out=f(2, dtype=torch.int64)),
    "cumprod drops imaginary parts first": lambda f: torch.cumprod(f(3).mul(1 + 2j), 0, out=f(3)),
    "mean does not compute in integers": lambda f: torch.mean(f(2, 3), 1, out=f(2, dtype=torch.int64)),
    "norm refuses another dtype": lambda f: torch.linalg.vector_norm(f(3), out=f(dtype=torch.float64)),
    "add resizes and warns": lambda f: torch.add(f(3), f(3), out=f(4)),
    "addbmm resizes": lambda f: torch.addbmm(f(1), f(2, 5, 3), f(2, 3, 4), out=f(5, 2)),
    "addbmm_ resizes": lambda f: f(1).addbmm_(f(2, 5, 3), f(2, 3, 4)),
    "addr_ refuses": lambda f: f().addr_(f(5), f(3)),
    "matrix_rank writes": lambda f: torch.linalg.matrix_rank(f(2, 3, 3), out=f(2, dtype=torch.int64)),
    "matrix_rank of what requires grad writes": lambda f: torch.linalg.matrix_rank(
        f(2, 3, 3).requires_grad_(), hermitian=True, out=f(2, dtype=torch.int64)
    ),
    "composite with gradients refuses": lambda f: torch.kron(f(2).requires_grad_(), f(3), out=f(6)),
    "fft of real numbers writes": lambda f: torch.fft.ihfft(f(6), out=f(7, dtype=torch.complex64)[::2]),
    "resize_as_ keeps strides": lambda f: f(3, 4).t().resize_as_(f(4, 3)),
    "resize_as_ takes a format": lambda f: f(3, 4).t().resize_as_(f(4, 3), memory_format=torch.contiguous_format),
    "resize_as_ preserves": lambda f: f(1, 2, 2, 1).resize_as_(
        f(1, 2, 2, 2).to(memory_format=torch.channels_last)[..., :1], memory_format=torch.preserve_format
    ),
    "resize_ keeps strides": lambda f: f(3, 4).t().resize_(4, 3),
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


def test_ihfftn_over_one_dimension_writes_what_it_returns():
    """CPU torch leaves `out` empty or unfinished there."""
    x = torch.arange(31.0, device="jax")
    out = torch.empty(0, dtype=torch.complex64, device="jax")
    torch.fft.ihfftn(x, out=out)
    torch.testing.assert_close(out.cpu(), torch.fft.ihfftn(x.cpu()))
