"""Which tensors share memory, and who writes what: compared between device jax and CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import mutation
from . import samples as _samples
from .compare import Mismatch, compare, tolerance_of
from .operators import Operator, operator
from .samples import Inapplicable, Sample


def assert_same_aliases(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], about: Any = "") -> None:
    """Raise unless `got`, tensors on device jax, are related as `want` are on CPU.

    Compared are shapes, strides, offsets, dtypes, versions, values (to the last bit but one in float32), and for each pair
    whether they share a storage and whether one is set to the other.

    Args:
        got: tensors on device jax.
        want: as many on CPU.
        about: what to say when they differ.

    Raises:
        Mismatch: an AssertionError that names the tensor or the pair.
    """
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        for what, a, b in (
            ("geometry", geometry(g), geometry(w)),
            ("version", g._version, w._version),
            ("contiguity", g.is_contiguous(), w.is_contiguous()),
        ):
            if a != b:
                raise Mismatch(f"tensor {i}: {what} {a} for {b}. {about}")
        if not _same_values(g.detach().cpu(), w.detach()):
            raise Mismatch(f"tensor {i}: {g.cpu()} for {w}. {about}")
    for i in range(len(want)):
        for j in range(i):
            for what, related in (("sharing a storage", _shares), ("is_set_to", torch.Tensor.is_set_to)):
                if related(got[i], got[j]) != related(want[i], want[j]):
                    raise Mismatch(f"tensors {i} and {j}: {what} is {related(want[i], want[j])} on CPU. {about}")


def geometry(t: torch.Tensor) -> tuple[Any, ...]:
    """Shape, strides, offset and dtype."""
    return tuple(t.shape), t.stride(), t.storage_offset(), t.dtype


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _same_values(g: torch.Tensor, w: torch.Tensor) -> bool:
    if w.dtype == torch.float32:
        if torch.equal(w.contiguous().view(torch.int32) & ~1, g.contiguous().view(torch.int32) & ~1):
            return True
        return torch.allclose(w, g, equal_nan=True)
    if torch.equal(w, g):
        return True
    return (w.is_floating_point() or w.is_complex()) and torch.allclose(w, g, rtol=0, atol=0, equal_nan=True)


def assert_aliasing(op: Any, samples: Iterable[Any]) -> None:
    """Raise unless a call of `op` relates its results to its arguments as it does on CPU, for every sample.

    Results share memory with an argument exactly where they do on CPU, and then what is written through one is seen
    through the other; a result is an argument exactly where it is on CPU; arguments that CPU leaves alone are left alone, by
    value and by version, and what it writes is written.

    Args:
        op: as for `assert_parity`.
        samples: as for `assert_parity`.

    Raises:
        Mismatch: an AssertionError that says what is shared or written and should not be, or the other way round.
    """
    target = operator(op)
    count = 0
    for i, x in enumerate(samples):
        call = _samples.as_sample(x)
        try:
            assert_aliasing_of(target, call)
            count += 1
        except Inapplicable:
            continue
        except Mismatch as error:
            raise Mismatch(f"{target.full_name}, sample {i}: {error}") from error
    if not count:
        raise Mismatch(f"{target.full_name}: CPU torch refuses every sample, or there is none; nothing was compared")


def assert_aliasing_of(op: Operator, call: Sample) -> None:
    """`assert_aliasing` for one sample; `Inapplicable` where CPU refuses it."""
    here, there = _samples.fresh(call), _samples.to_jax(call)
    torch.manual_seed(_samples.SEED)
    want = mutation.attempt(lambda: op(here.input, *here.args, **here.kwargs))
    torch.manual_seed(_samples.SEED)
    got = mutation.attempt(lambda: op(there.input, *there.args, **there.kwargs))
    mutation.same_error(got.error, want.error)
    if want.error is not None:
        raise Inapplicable(f"CPU torch: {mutation.brief(want.error)}")
    if op.reference is None:
        for what, ask in (("shares memory with", _owners), ("is the same object as", _identities)):
            ours, cpus = ask(got.result, there), ask(want.result, here)
            if ours != cpus:
                raise Mismatch(f"what each result {what}, by the argument's number: {ours}, on CPU {cpus}")
    elif any(owner is not None for owner in _owners(got.result, there)):
        raise Mismatch("a result shares memory with an argument; the reference says nothing of views")
    versions = [
        [t._version - before._version for t, before in zip(after.tensors(), again.tensors(), strict=True)]
        for after, again in ((there, _samples.to_jax(call)), (here, _samples.fresh(call)))
    ]
    if versions[0] != versions[1]:
        raise Mismatch(f"the arguments were written {versions[0]} times, on CPU {versions[1]}")
    compare(there.tensors(), here.tensors(), lambda dtype: tolerance_of(op, dtype), values=op.values)
    if any(owner is not None for owner in _owners(want.result, here)) and op.reference is None:
        mutation.view(op, call, lambda g, w, *_, **__: compare(g, w, lambda dtype: tolerance_of(op, dtype)))


def _owners(result: Any, call: Sample) -> list[int | None]:
    return mutation.shared(mutation.tensors_of(result), call)


def _identities(result: Any, call: Sample) -> list[int | None]:
    positions = {id(t): i for i, t in enumerate(call.tensors())}
    return [positions.get(id(t)) for t in mutation.tensors_of(result)]
