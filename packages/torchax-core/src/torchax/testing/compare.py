"""Whether a result on device jax is CPU torch's: metadata, values within tolerances, invariants where results are not unique."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from .operators import Operator, Tolerance
from .samples import Sample


class Mismatch(AssertionError):
    """A result is not what CPU torch gives."""


DEFAULTS = {
    torch.float16: Tolerance(1e-3, 1e-5),
    torch.bfloat16: Tolerance(1.6e-2, 1e-5),
    torch.float32: Tolerance(1.3e-6, 1e-5),
    torch.float64: Tolerance(1e-7, 1e-7),
    torch.complex32: Tolerance(1e-3, 1e-5),
    torch.complex64: Tolerance(1.3e-6, 1e-5),
    torch.complex128: Tolerance(1e-7, 1e-7),
}
# how much farther from the exact result than CPU torch a result may be: factor of CPU's largest error, units in the last place
SLACK = {
    torch.float16: (2, 1),
    torch.bfloat16: (2, 1),
    torch.float32: (4, 4),
    torch.complex64: (4, 4),
}
_TOLERANCE_TESTS = (
    None,
    "test_compare_cpu",
    "test_noncontiguous_samples",
    "test_out",
    "test_variant_consistency_eager",
)

# beyond torch's own tolerances, each with the reason why the last digits are not defined
EXTRA: dict[str, tuple[Tolerance, str]] = {
    "erfinv": (Tolerance(1e-5, 1e-5), "the gradient magnifies the last bit of a result near 1 by exp(result**2)"),
}


def tolerance_of(op: Any, dtype: torch.dtype) -> Tolerance:
    """torch.testing's default, or the widest of what OpInfo and `EXTRA` allow; for an `Operator`, what it says."""
    if isinstance(op, Operator):
        return op.tolerances.get(dtype, DEFAULTS.get(dtype, Tolerance(0, 0)))
    from torch.testing._internal.common_device_type import toleranceOverride
    from torch.testing._internal.opinfo.core import DecorateInfo

    found = [DEFAULTS.get(dtype, Tolerance(0, 0))]
    for info in op.decorators:
        if isinstance(info, DecorateInfo) and info.test_name in _TOLERANCE_TESTS:
            for decorator in info.decorators:
                if isinstance(decorator, toleranceOverride) and dtype in decorator.d:
                    found.append(Tolerance(decorator.d[dtype].rtol, decorator.d[dtype].atol))
    if op.full_name in EXTRA and dtype in DEFAULTS:
        found.append(EXTRA[op.full_name][0])
    return Tolerance(max(t.rtol for t in found), max(t.atol for t in found))


# Results ----------------------------------------------------------------------------------------------------------


def compare(
    got: Any,
    want: Any,
    tolerance: Callable[[torch.dtype], Tolerance],
    *,
    values: bool = True,
    layout: bool = False,
    reference: Callable[[], Any] | None = None,
) -> None:
    """Raise `Mismatch` unless `got` is `want`.

    Args:
        got: the result on device jax, a tensor or any container.
        want: the result on CPU.
        tolerance: tolerances of a dtype.
        values: compare the values, not only the metadata.
        layout: compare strides, where torch defines them.
        reference: gives the result in double precision; asked for if values differ.
    """
    got_leaves, got_spec = pytree.tree_flatten(got)
    want_leaves, want_spec = pytree.tree_flatten(want)
    if len(got_leaves) != len(want_leaves):
        raise Mismatch(f"{len(got_leaves)} results for {len(want_leaves)}: {got_spec} for {want_spec}")
    exact: list[Any] | None = None
    for i, (g, w) in enumerate(zip(got_leaves, want_leaves, strict=True)):
        label = f"result {i}: " if len(want_leaves) > 1 else ""
        if not isinstance(w, torch.Tensor):
            _same_object(g, w, label)
            continue
        _same_metadata(g, w, label, layout)
        if not values:
            continue
        g, w = host(g), host(w)
        problem = _difference(g, w, tolerance(w.dtype))
        if problem and reference is not None and w.dtype in SLACK:
            if exact is None:
                try:
                    exact = pytree.tree_leaves(reference())
                except Exception:
                    exact = []
            if len(exact) == len(want_leaves) and isinstance(exact[i], torch.Tensor):
                problem = problem if not _as_exact(g, w, host(exact[i])) else ""
        if problem:
            raise Mismatch(label + problem)


def host(t: torch.Tensor) -> torch.Tensor:
    """A tensor's values on CPU, without conj and neg bits."""
    return t.detach().cpu().resolve_conj().resolve_neg()


def _same_object(got: Any, want: Any, label: str) -> None:
    if isinstance(want, torch.device) or (isinstance(want, str) and want == "cpu"):
        return
    if type(got) is not type(want):
        raise Mismatch(f"{label}{type(got).__name__} for {type(want).__name__}")
    if isinstance(want, (float, complex)):
        problem = _difference(torch.tensor(got), torch.tensor(want), Tolerance(1e-5, 1e-5))
        if problem:
            raise Mismatch(label + problem)
    elif got != want:
        raise Mismatch(f"{label}{got!r} for {want!r}")


def _same_metadata(got: Any, want: torch.Tensor, label: str, layout: bool) -> None:
    if not isinstance(got, torch.Tensor):
        raise Mismatch(f"{label}{type(got).__name__} for a tensor")
    if got.device.type != "jax":
        raise Mismatch(f"{label}the result is on {got.device}")
    if got.layout != want.layout:
        raise Mismatch(f"{label}layout {got.layout} for {want.layout}")
    if got.dtype != want.dtype:
        raise Mismatch(f"{label}{got.dtype} for {want.dtype}")
    if got.shape != want.shape:
        raise Mismatch(f"{label}shape {tuple(got.shape)} for {tuple(want.shape)}")
    if layout and strides(got) != strides(want):
        raise Mismatch(f"{label}strides {got.stride()} for {want.stride()} (shape {tuple(want.shape)})")


def strides(t: torch.Tensor) -> list[int]:
    """The strides that mean something: none of an empty tensor, not those of dimensions of size one."""
    return [] if not t.numel() else [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


def _difference(got: torch.Tensor, want: torch.Tensor, tolerance: Tolerance) -> str:
    """What is wrong with the values; empty if nothing is."""
    close = torch.isclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True)
    if close.all():
        return ""
    at = tuple((~close).nonzero()[0].tolist())
    bad = int((~close).sum())
    note = ""
    if got.dtype.is_floating_point or got.dtype.is_complex:
        wide = torch.complex128 if got.dtype.is_complex else torch.float64
        error = (got.to(wide) - want.to(wide)).abs()
        error = error[error.isfinite()]
        note = f", error up to {error.max().item():.2g}" if error.numel() else ""
    return f"{bad} of {want.numel()} values differ{note}; {got[at].item()} for {want[at].item()} at {list(at)}"


def _as_exact(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether a result is about as near to the exact one as CPU torch's is."""
    if exact.shape != want.shape or exact.dtype.is_complex != want.dtype.is_complex:
        return False
    factor, places = SLACK[want.dtype]
    info = torch.finfo(want.dtype)
    if want.dtype.is_complex:
        got, want, exact = (torch.view_as_real(t) for t in (got, want, exact))
    rounded = exact.to(want.dtype)  # where the exact result overflows, infinity is right
    got, want, exact = got.double(), want.double(), exact.double()
    error = (want - exact).abs()
    error = error[error.isfinite()]
    allowed = factor * (error.max() if error.numel() else 0) + places * info.eps * exact.abs() + info.tiny
    near = (got - exact).abs() <= allowed
    same = torch.isclose(got, want, rtol=0, atol=0, equal_nan=True)
    same |= torch.isclose(got, rounded.double(), rtol=0, atol=0, equal_nan=True)
    return bool((near | same).all())


# Results that are not unique --------------------------------------------------------------------------------------


def _svd(result: Any, sample: Sample) -> Any:
    u, s, v = result
    k = s.shape[-1]
    return (u[..., :k] * s.unsqueeze(-2).to(u.dtype)) @ v.mH[..., :k, :], s, u.mH @ u, v.mH @ v


def _linalg_svd(result: Any, sample: Sample) -> Any:
    u, s, vh = result
    if not u.numel() and s.numel():
        return u, s, vh  # compute_uv=False
    return _svd((u, s, vh.mH), sample)


def _eigh(result: Any, sample: Sample) -> Any:
    values, vectors = result
    return values, (vectors * values.unsqueeze(-2).to(vectors.dtype)) @ vectors.mH, vectors.mH @ vectors


def _eig(result: Any, sample: Sample) -> Any:
    values, vectors = result
    a = sample.input.detach().to(vectors.device).to(vectors.dtype)
    return a @ vectors - vectors * values.unsqueeze(-2), vectors.abs().square().sum(-2)


def _qr(result: Any, sample: Sample) -> Any:
    q, r = result
    if not q.numel():
        return q, r.abs()
    return q @ r, r.abs(), q.mH @ q


def _picked(where: int) -> Callable[[Any, Sample], Any]:
    """Any of several equal elements may be named by its index; `where` is the position of ``dim`` in the arguments."""

    def unique(result: Any, sample: Sample) -> Any:
        if isinstance(result, torch.Tensor):
            return result
        values, indices = result
        x = sample.input.detach()
        dim = sample.kwargs.get("dim", sample.args[where] if len(sample.args) > where else -1)
        at = indices if indices.dim() == x.dim() else indices.unsqueeze(dim)
        return values, torch.zeros_like(indices), x.gather(dim, at)

    return unique


def _drawn(result: Any, sample: Sample) -> Any:
    """Shapes and dtypes of random results are compared, strides are not: they are those of some product."""
    return list(result)


def _sorted(result: Any, sample: Sample) -> Any:
    """Unless asked to be stable, equal elements may come in any order."""
    if sample.kwargs.get("stable"):
        return result
    indices = result if isinstance(result, torch.Tensor) else result[1]
    dim = sample.kwargs.get("dim", next((a for a in sample.args if type(a) is int), -1))
    x = sample.input.detach()
    picked = x.gather(dim, indices) if x.dim() else x
    if isinstance(result, torch.Tensor):
        return picked, torch.zeros_like(indices)
    return result[0], torch.zeros_like(indices), picked


INVARIANTS: dict[str, Callable[[Any, Sample], Any]] = {
    "svd": _svd,
    "linalg.svd": _linalg_svd,
    "linalg.eigh": _eigh,
    "linalg.eig": _eig,
    "linalg.qr": _qr,
    "qr": _qr,
    "sort": _sorted,
    "argsort": _sorted,
    "svd_lowrank": _drawn,
    "pca_lowrank": _drawn,
    "kthvalue": _picked(1),
    "topk": _picked(1),
    "median": _picked(0),
    "nanmedian": _picked(0),
    "mode": _picked(0),
}


def invariant(op: Any, result: Any, sample: Sample) -> Any:
    """What of a result is unique; the result itself for most operators."""
    fn = INVARIANTS.get(op.full_name)
    if fn is None or pytree.tree_any(lambda t: isinstance(t, torch.Tensor) and t.is_meta, result):
        return result
    with torch.no_grad():
        return fn(result, sample)
