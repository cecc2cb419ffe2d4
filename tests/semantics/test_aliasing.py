"""Random programs of views and writes, run on jax and on CPU side by side; every alias is compared after every step."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchax.testing import assert_same_aliases

SHAPES = [(4,), (4, 3), (2, 4, 2), (6, 2), (3, 3), (2, 2, 3)]

# name -> (tensor, number) -> view, or None where it does not apply
VIEWS = {
    "detach": lambda t, n: t.detach(),
    "data": lambda t, n: t.data,
    "view": lambda t, n: t.view(-1) if t.is_contiguous() else None,
    "reshape": lambda t, n: t.reshape(t.shape[::-1]),
    "slice": lambda t, n: t[n % t.shape[0] :: 1 + n % 2] if t.dim() else None,
    "last": lambda t, n: t[..., n % t.shape[-1]] if t.dim() else None,
    "columns": lambda t, n: t[:, 1:] if t.dim() > 1 else None,
    "select": lambda t, n: t.select(n % t.dim(), n % t.shape[n % t.dim()]) if t.dim() else None,
    "narrow": lambda t, n: t.narrow(-1, n % t.shape[-1], 1) if t.dim() else None,
    "transpose": lambda t, n: t.transpose(0, -1) if t.dim() else None,
    "permute": lambda t, n: t.permute(*[(i + n) % t.dim() for i in range(t.dim())]) if t.dim() else None,
    "diagonal": lambda t, n: t.diagonal(n % 2) if t.dim() > 1 else None,
    "unsqueeze": lambda t, n: t.unsqueeze(n % (t.dim() + 1)) if t.dim() < 5 else None,
    "squeeze": lambda t, n: t.squeeze(),
    "expand": lambda t, n: t.expand(2, *t.shape)[1] if t.dim() < 5 else None,
    "split": lambda t, n: t.split(1 + n % 2)[-1] if t.dim() else None,
    "unbind": lambda t, n: t.unbind(-1)[n % t.shape[-1]] if t.dim() else None,
    "chunk": lambda t, n: t.chunk(2)[0] if t.dim() else None,
    "unfold": lambda t, n: t.unfold(0, 2, 2) if t.dim() and t.shape[0] >= 2 else None,
    "as_strided": lambda t, n: t.as_strided((2, 2), (2, 1), n % 2) if t.untyped_storage().nbytes() >= 5 * t.element_size() else None,
    "flatten": lambda t, n: t.flatten(),
    "unflatten": lambda t, n: t.unflatten(0, (-1, 1)) if t.dim() in (1, 2) else None,
    "int32": lambda t, n: t.view(torch.int32) if t.dtype == torch.float32 else t.view(torch.float32),
    "contiguous": lambda t, n: t.contiguous(),
    "clone": lambda t, n: t.clone(),
}  # fmt: skip
WRITES = {
    "add_": lambda t, k: t.add_(k),
    "mul_": lambda t, k: t.mul_(k),
    "fill_": lambda t, k: t.fill_(k),
    "zero_": lambda t, k: t.zero_(),
    "neg_": lambda t, k: t.neg_(),
    "clamp_": lambda t, k: t.clamp_(-3, 3),
    "copy_": lambda t, k: t.copy_(t.clone() + k),
    "copy_ broadcast": lambda t, k: t.copy_(torch.full((1,), k, dtype=t.dtype, device=t.device)),
    "setitem": lambda t, k: t.__setitem__(0 if t.dim() else ..., k),
    "setitem mask": lambda t, k: t.__setitem__(t > 0, k),
    "setitem step": lambda t, k: t.__setitem__((..., slice(None, None, 2)) if t.dim() else ..., k),
    "masked_fill_": lambda t, k: t.masked_fill_(t < 0, k),
    "out": lambda t, k: torch.add(t, k, out=t),
    "out of view": lambda t, k: torch.neg(t.clone(), out=t),
    "data": lambda t, k: t.data.add_(k),
    "detach": lambda t, k: t.detach().mul_(k),
    "flip": lambda t, k: t.copy_(t.flip(0)) if t.dim() else None,
    "foreach": lambda t, k: torch._foreach_add_([t], k),
    "index_fill_": lambda t, k: t.index_fill_(0, torch.tensor([0], device=t.device), k) if t.dim() else None,
    "set data": lambda t, k: setattr(t, "data", t.clone().mul_(k)),
    "transpose_": lambda t, k: t.transpose_(0, -1) if t.dim() else None,
    "unsqueeze_": lambda t, k: t.unsqueeze_(0) if t.dim() < 4 else None,
    "squeeze_": lambda t, k: t.squeeze_(),
    "resize_": lambda t, k: t.resize_(2, 2),
    "set_": lambda t, k: t.set_(t.clone()),
}  # fmt: skip
NOT_WITH_GRADIENTS = {  # refused by torch, or done behind the graph's back
    "resize_", "set_", "set data", "int32", "data", "transpose_", "unsqueeze_", "squeeze_", "as_strided", "split", "unbind", "chunk",
}  # fmt: skip
steps = st.lists(
    st.tuples(
        st.integers(0, 99), st.sampled_from([*VIEWS, *VIEWS, *WRITES]), st.integers(0, 5), st.sampled_from([1, 2, -3])
    ),
    min_size=4,
    max_size=10,
)


def overlaps(t: torch.Tensor) -> bool:
    """Whether two of its elements are one in memory: what a write through it does is undefined."""
    reach = 1
    for size, stride in sorted(((n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1), key=lambda p: p[1]):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def run(shape, program, requires_grad=False):
    base = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).clone() - 3
    cpus, others, log = [base.clone()], [base.clone().to("jax")], []
    if requires_grad:
        leaves = [ts[0].requires_grad_() for ts in (cpus, others)]
        cpus, others = [[ts[0] * 1] for ts in (cpus, others)]
    for pick, name, n, k in program:
        i = pick % len(cpus)
        view = name in VIEWS
        if not view and overlaps(cpus[i]):
            continue
        if requires_grad and name in NOT_WITH_GRADIENTS:
            continue
        results = []
        for ts in (cpus, others):
            try:
                made = VIEWS[name](ts[i], n) if view else WRITES[name](ts[i], k)
                results.append((made, None))
            except Exception as error:
                results.append((None, error))
        (a, failed), (b, other_failed) = results
        log.append((i, name, n, k))
        assert (failed is None) == (other_failed is None) and type(failed) is type(other_failed), (
            log,
            failed,
            other_failed,
        )
        if view and failed is None and a is not None and len(cpus) < 8:
            assert (a is cpus[i]) == (b is others[i]), log
            cpus.append(a)
            others.append(b)
        if not requires_grad:
            assert_same_aliases(others, cpus, log)
    if requires_grad:
        for ts in (cpus, others):
            total = sum((t * (j + 1)).sum() for j, t in enumerate(ts) if t.is_floating_point() and t.requires_grad)
            total.backward()
        torch.testing.assert_close(leaves[1].grad.cpu(), leaves[0].grad, msg=lambda m: f"{log}\n{m}")


relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("ignore")
@relaxed
@given(st.sampled_from(SHAPES), steps)
def test_aliases_agree_after_every_step(shape, program):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(shape, program)


@pytest.mark.filterwarnings("ignore")
@relaxed
@given(st.sampled_from(SHAPES), steps)
def test_gradients_through_views_and_writes_agree(shape, program):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(shape, program, requires_grad=True)
