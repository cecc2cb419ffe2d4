"""Forms in which tensors are written: in-place, out=, views; and the errors for bad arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree

from .. import errors
from . import compare, samples
from .compare import Mismatch
from .operators import Operator
from .samples import CaseTimeout, Inapplicable, Sample

Values = Callable[..., None]  # (got, want, reference=None): raises Mismatch unless they agree


class Outcome(NamedTuple):
    """What became of a call."""

    result: Any
    error: Exception | None
    warned: bool


def attempt(fn: Callable[[], Any]) -> Outcome:
    """Call, and wait for the device: what it finds wrong with values it says later. An exception is an outcome."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, error = fn(), None
            settle()
        except (Inapplicable, CaseTimeout):
            raise
        except Exception as raised:
            result, error = None, raised
    return Outcome(result, error, any("resized" in str(w.message) for w in caught))


def settle() -> None:
    """Wait for the device; raises what an operator found wrong."""
    torch.jax.synchronize()  # pyright: ignore[reportAttributeAccessIssue]


def same_error(got: Exception | None, want: Exception | None) -> None:
    """Both sides fail, and the exception here is one that catches as CPU torch's does."""
    if want is None:
        if got is not None:
            raise got
        return
    wanted = f"{type(want).__name__} ({brief(want)})"
    if got is None:
        raise Mismatch(f"no error for CPU's {wanted}")
    internal = isinstance(got, (errors.LoweringError, errors.OperatorNotFound))
    if not isinstance(got, type(want)) or (internal and not isinstance(want, NotImplementedError)):
        raise Mismatch(f"{type(got).__name__} ({brief(got)}) for CPU's {wanted}")


def brief(error: BaseException, width: int = 100) -> str:
    """The first line of an exception's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:width] if lines else ""


# In-place ---------------------------------------------------------------------------------------------------------


def inplace(op: Any, sample: Sample, same: Values) -> None:
    """The in-place method: gives the very tensor, writes CPU's values, fails as CPU does and writes nothing then."""
    here, there = samples.fresh(sample), samples.to_jax(sample)
    before = samples.fresh(sample)
    want = attempt(lambda: op.inplace_variant(here.input, *here.args, **here.kwargs))
    got = attempt(lambda: op.inplace_variant(there.input, *there.args, **there.kwargs))
    same_error(got.error, want.error)
    if want.error is None:
        if (got.result is there.input) is not (want.result is here.input):
            raise Mismatch("the result is not the tensor that was written")
        same(there.tensors(), here.tensors(), lambda: _written(op, samples.upcast(sample)))
        if compare.strides(there.input) != compare.strides(here.input):
            raise Mismatch(f"strides {there.input.stride()} for {here.input.stride()}")
    else:
        same(there.tensors(), before.tensors())


def _written(op: Any, sample: Sample) -> list[torch.Tensor]:
    op.inplace_variant(sample.input, *sample.args, **sample.kwargs)
    return sample.tensors()


# out= -------------------------------------------------------------------------------------------------------------


def _other_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """One dtype that results cannot be cast to, if there is one, and one that they can."""
    if dtype.is_complex:
        return (torch.float32, torch.complex64 if dtype != torch.complex64 else torch.complex128)
    if dtype.is_floating_point:
        return (torch.int64, torch.float64 if dtype != torch.float64 else torch.float32)
    return (torch.bool if dtype != torch.bool else torch.int32, torch.float32)


def _filled(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 7, dtype=dtype)


def _out_kinds(expected: list[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    yield "right", [_filled(t.shape, t.dtype) for t in expected]
    yield "empty", [_filled((0,), t.dtype) for t in expected]
    yield "wrong size", [_filled((*t.shape, 2), t.dtype) for t in expected]
    yield "strided", [_filled((*t.shape, 2), t.dtype)[..., 1] for t in expected]
    transposed = [_filled(t.shape[::-1], t.dtype).permute(tuple(range(t.dim()))[::-1]) for t in expected]
    yield "transposed", transposed
    for dtypes in zip(*[_other_dtypes(t.dtype) for t in expected], strict=True):
        yield f"as {dtypes[0]}", [_filled(t.shape, d) for t, d in zip(expected, dtypes, strict=True)]


def out(op: Any, sample: Sample, same: Values, values: bool) -> None:
    """``out=`` of the right size, of wrong ones, strided, and of other dtypes: as CPU has it."""
    expected = _call(op, samples.fresh(sample))
    single = isinstance(expected, torch.Tensor)
    leaves = list(expected) if isinstance(expected, (list, tuple)) else [expected]
    if not leaves or not all(isinstance(t, torch.Tensor) for t in leaves):
        raise Inapplicable("the results are not tensors")
    refused = attempt(lambda: _call(op, samples.fresh(sample), out=_given([t.clone() for t in leaves], single))).error
    for kind, here in _out_kinds(leaves):
        if refused is not None and kind in ("strided", "transposed"):
            continue
        there = [samples.tensor_to_jax(t) for t in here]
        # what lies between the elements that are written must stay; the base is the whole storage, see `samples`
        between = [(samples.flat(t)[::2], u._base) for t, u in zip(here, there, strict=True) if kind == "strided"]
        try:
            _one_out(op, sample, (here, there, leaves), single, same, values, kind)
            same([u[::2] for _, u in between if u is not None], [t for t, u in between if u is not None])
        except CaseTimeout:
            raise
        except Exception as error:
            text = str(error) if isinstance(error, Mismatch) else f"{type(error).__name__}: {brief(error, 200)}"
            raise Mismatch(f"out= ({kind}): {text}") from error


def _given(outs: list[torch.Tensor], single: bool) -> Any:
    return outs[0] if single else tuple(outs)


def _one_out(op: Any, sample: Sample, outs: Any, single: bool, same: Values, values: bool, kind: str) -> None:
    here, there, expected = outs
    before = [t.clone() for t in here]
    on_cpu, on_jax = samples.fresh(sample), samples.to_jax(sample)
    on_jax.kwargs.pop("device", None)  # said by the tensor given as out=
    if kind in ("strided", "transposed"):  # some CPU kernels write these as if they were contiguous, or past the end
        want = attempt(lambda: [t.copy_(e) for t, e in zip(here, expected, strict=True)])
    else:
        want = attempt(lambda: _call(op, on_cpu, out=_given(here, single)))
    got = attempt(lambda: _call(op, on_jax, out=_given(there, single)))
    dtypes = [(e.dtype, t.dtype) for e, t in zip(expected, here, strict=True)]
    castable = all(torch.can_cast(*d) for d in dtypes) and any(a != b for a, b in dtypes)
    if want.error is not None and got.error is None and castable:
        return  # some CPU kernels take no other dtype than their own; torch asks only that unsafe casts be refused
    if isinstance(want.error, NotImplementedError) and got.error is None:
        return
    same_error(got.error, want.error)
    for g, w, b in zip(there, here, before, strict=True):
        resized = w.shape != b.shape  # to strides that torch does not define
        if want.error is None and not resized and compare.strides(g) != compare.strides(w):
            raise Mismatch(f"strides {g.stride()} for {w.stride()} (shape {tuple(w.shape)})")
        if want.error is not None and values and w.shape == b.shape and torch.equal(w, b):
            same(g, w)  # nothing was written
    if want.error is None:
        # a result that was cast has the precision that it was computed in
        got_cast, want_cast = ([t.to(e.dtype) for t, e in zip(x, expected, strict=True)] for x in (there, here))
        unique = lambda outs, s: compare.invariant(op, _given(outs, single), s)
        wide = samples.upcast(sample)
        same(unique(got_cast, on_jax), unique(want_cast, on_cpu), lambda: unique(tensors_of(_call(op, wide)), wide))
    if want.error is None:
        heard = not isinstance(op, Operator)  # called as an overload, CPU torch warns on stderr
        if kind == "wrong size" and heard and got.warned is not want.warned:
            raise Mismatch("no warning of the resize" if want.warned else "a warning of a resize that is none on CPU")
        results = zip(tensors_of(got.result), there, strict=False)
        if want.result is not None and not all(r is t or r.data_ptr() == t.data_ptr() for r, t in results):
            raise Mismatch("the result is not the tensor given as out=")


def _call(op: Any, sample: Sample, **more: Any) -> Any:
    return op(sample.input, *sample.args, **sample.kwargs, **more)


# Views ------------------------------------------------------------------------------------------------------------


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


def tensors_of(x: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


def shared(result: list[torch.Tensor], sample: Sample) -> list[int | None]:
    """For each result, which input has the same storage."""
    owners = {_storage(t): i for i, t in reversed(list(enumerate(sample.tensors()))) if t.numel()}
    return [owners.get(_storage(t)) if t.numel() else None for t in result]


def _write(t: torch.Tensor) -> None:
    if t.dtype == torch.bool:
        t.logical_not_()
    else:
        t.mul_(2).add_(1)


def _overlaps(t: torch.Tensor) -> bool:
    """Whether elements share memory in a way that torch does not see: what a write does is not defined."""
    if torch._debug_has_internal_overlap(t) != 2:
        return False
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return torch.arange(reach).as_strided(t.shape, t.stride()).unique().numel() < t.numel()


def view(op: Any, sample: Sample, same: Values) -> None:
    """Results that share memory with an input do so here: geometry, writes through the result, writes through the input."""
    here, there = samples.fresh(sample), samples.to_jax(sample)
    want = tensors_of(_call(op, here))
    if any(t.layout is not torch.strided for t in want):
        raise Inapplicable("not strided")
    owners = shared(want, here)
    if not any(o is not None for o in owners):
        raise Inapplicable("no result is a view")  # and form forward sees that none is here
    got = tensors_of(_call(op, there))
    found = shared(got, there)
    if found != owners:
        raise Mismatch(f"results share memory with the inputs {found}, on CPU {owners}")
    inputs_here, inputs_there = here.tensors(), there.tensors()
    for g, w, owner in zip(got, want, owners, strict=True):
        if owner is None:
            continue
        if g.stride() != w.stride() or g.storage_offset() != w.storage_offset():
            raise Mismatch(f"strides {g.stride()}, offset {g.storage_offset()} for {w.stride()}, {w.storage_offset()}")
        if _overlaps(w):
            continue
        outcome, here_outcome = attempt(lambda g=g: _write(g)), attempt(lambda w=w: _write(w))
        same_error(outcome.error, here_outcome.error)
    same(inputs_there, inputs_here)
    same(got, want)
    for owner in sorted({o for o in owners if o is not None}):
        outcome, here_outcome = (attempt(lambda t=s[owner]: _write(t)) for s in (inputs_there, inputs_here))
        same_error(outcome.error, here_outcome.error)
    same(inputs_there, inputs_here)
    same(got, want)


# Errors -----------------------------------------------------------------------------------------------------------


def error_cases(op: Any) -> list[Sample]:
    """The calls that OpInfo says are wrong."""
    torch.manual_seed(samples.SEED)
    return [samples.of(e.sample_input) for e in samples.drawn(op.error_inputs_func, op, "cpu")]


def wrong_call(op: Any, sample: Sample) -> None:
    """A call that CPU torch refuses is refused with an exception of the same class."""
    want = attempt(lambda: _call(op, samples.fresh(sample)))
    if want.error is None:
        raise Inapplicable("CPU torch takes it")
    try:
        there = samples.to_jax(sample)
    except (RuntimeError, TypeError, ValueError) as error:
        raise Inapplicable(f"cannot be made: {brief(error)}") from None
    same_error(attempt(lambda: _call(op, there)).error, want.error)
