"""Samples of OpInfo: copied with their geometry, moved to device jax, upcast for a more exact reference."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import torch
import torch.utils._pytree as pytree

from .drafts import Draft

SEED = 20240
UPCAST = {
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


HOST = {"tensor_split": (0,)}


class Inapplicable(Exception):
    """A form has nothing to say about a sample."""


class CaseTimeout(Exception):
    """A case takes too long."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The arguments of one call of an operator."""

    input: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    process: Callable[[Any], Any] = lambda result: result
    host: tuple[int, ...] = ()  # positions in args of tensors that are on CPU whatever the device is

    def map(self, fn: Callable[[Any], Any]) -> Sample:
        """The sample with `fn` applied to every leaf; the same object gives the same object."""
        memo: dict[int, Any] = {}

        def once(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return fn(leaf)
            if id(leaf) not in memo:
                memo[id(leaf)] = fn(leaf)
            return memo[id(leaf)]

        moved = pytree.tree_map(once, [self.input, list(self.args), self.kwargs])
        return dataclasses.replace(self, input=moved[0], args=tuple(moved[1]), kwargs=moved[2])

    def tensors(self) -> list[torch.Tensor]:
        """The different tensors among the arguments, in order, without those that stay on CPU."""
        args = [x for i, x in enumerate(self.args) if i not in self.host]
        leaves = pytree.tree_leaves([self.input, args, self.kwargs])
        return list({id(t): t for t in leaves if isinstance(t, torch.Tensor)}.values())

    def with_tensors(self, tensors: list[torch.Tensor]) -> Sample:
        """The sample with other tensors in the places of `tensors`."""
        replacement = {id(old): new for old, new in zip(self.tensors(), tensors, strict=True)}
        return self.map(lambda x: replacement.get(id(x), x) if isinstance(x, torch.Tensor) else x)


def sample(*args: Any, **kwargs: Any) -> Sample:
    """The sample with these arguments: CPU tensors, `drafts.Draft`s and whatever else the operator takes.

    Raises:
        TypeError: there is no positional argument.
    """
    if not args:
        raise TypeError("a sample has at least one positional argument, the operator's first")
    made = Sample(args[0], tuple(args[1:]), dict(kwargs))
    return made.map(lambda x: x.make() if isinstance(x, Draft) else x)


def of(info: Any, host: tuple[int, ...] = ()) -> Sample:
    """The sample that a `SampleInput` describes."""
    return Sample(info.input, tuple(info.args), dict(info.kwargs), info.output_process_fn_grad, host)


def as_sample(x: Any) -> Sample:
    """A `Sample` out of what users write: a `Sample`, OpInfo's ``SampleInput``, a tuple of arguments, or one argument.

    Raises:
        ValueError: a tensor in it is not on CPU.
    """
    if isinstance(x, Sample):
        made = sample(x.input, *x.args, **x.kwargs) if not x.host else x
    elif hasattr(x, "output_process_fn_grad"):
        made = of(x)
    else:
        made = sample(*x) if type(x) is tuple else sample(x)
    if elsewhere := [t.device for t in made.tensors() if t.device.type != "cpu"]:
        raise ValueError(
            f"samples are tensors on CPU, from where they are moved to device jax; one is on {elsewhere[0]}"
        )
    return made


def drawn(make: Callable[..., Iterable[Any]], *args: Any) -> Iterator[Any]:
    """What a function of OpInfo makes, the random state of the CPU set anew before each item.

    The items are those of ``OpInfo.sample_inputs`` and ``error_inputs``, which seed absent accelerators as well: each of these keeps
    the traceback of the call, and that takes longer than all else.
    """
    from torch.testing._internal import common_utils  # loaded already where there are OpInfos

    items = iter(make(*args))
    while True:
        torch.default_generator.manual_seed(common_utils.SEED)
        random.seed(common_utils.SEED)
        numpy.random.seed(common_utils.SEED)
        try:
            item = next(items)
        except StopIteration:
            return
        yield item


_generated: collections.OrderedDict[Any, tuple[Sample, ...]] = collections.OrderedDict()


def generate(op: Any, dtype: torch.dtype, requires_grad: bool = False, seed: int = SEED) -> tuple[Sample, ...]:
    """All samples of an operator on CPU, always the same ones; the last few lists are kept."""
    key = op.full_name, dtype, requires_grad, seed
    if key not in _generated:
        torch.manual_seed(seed)
        items = drawn(op.sample_inputs_func, op, "cpu", dtype, requires_grad)
        _generated[key] = tuple(of(s, HOST.get(op.full_name, ())) for s in items)
        if len(_generated) > 8:
            _generated.popitem(last=False)
    return _generated[key]


def spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` positions, evenly spread, the first and the last included."""
    if limit is None or count <= limit:
        return list(range(count))
    if limit == 1:
        return [0]
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


# Copies -----------------------------------------------------------------------------------------------------------


def require_strided(t: torch.Tensor) -> None:
    """Raise `Inapplicable` for a sparse, nested or quantised tensor."""
    if t.layout is not torch.strided or t.is_nested or t.is_quantized:
        raise Inapplicable(f"layout {t.layout}")


def _plain(t: torch.Tensor) -> torch.Tensor:
    """The same memory without conj and neg bits."""
    require_strided(t)
    t = t.detach()
    if t.is_conj():
        t = t.conj()
    return torch._neg_view(t) if t.is_neg() else t


def _marked(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if like.is_neg():
        t = torch._neg_view(t)
    if like.is_conj():
        t = t.conj()
    return t


def flat(t: torch.Tensor) -> torch.Tensor:
    """The whole storage of a CPU tensor as a vector of its dtype."""
    storage = t.untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(storage, 0, (storage.nbytes() // t.element_size(),), (1,))


def _carrier(transfer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    """A function that copies CPU tensors with strides, offsets, shared memory, conj and neg bits."""
    storages: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def carry(t: torch.Tensor) -> torch.Tensor:
        plain = _plain(t)
        whole = plain.numel() * plain.element_size() == plain.untyped_storage().nbytes()
        if whole and plain.is_contiguous():
            moved = transfer(plain)
        else:
            key = plain.untyped_storage()._cdata, plain.dtype
            if key not in storages:
                storages[key] = transfer(flat(plain))
            moved = storages[key].as_strided(plain.shape, plain.stride(), plain.storage_offset())
        moved = _marked(moved, t)
        return moved.requires_grad_() if t.requires_grad else moved

    return carry


def _transfer(t: torch.Tensor) -> torch.Tensor:
    return t.clone().to("jax")  # a copy: reading a tensor through numpy leaves its storage unable to be resized


def fresh(sample: Sample) -> Sample:
    """A copy on CPU."""
    carry = _carrier(lambda t: t.clone())
    return sample.map(lambda x: carry(x) if isinstance(x, torch.Tensor) else x)


def to_jax(sample: Sample) -> Sample:
    """A copy on device jax; arguments that name the CPU name jax."""
    carry = _carrier(_transfer)

    def moved(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return carry(x)
        if (isinstance(x, str) and x == "cpu") or (isinstance(x, torch.device) and x.type == "cpu"):
            return "jax"
        return x

    there = sample.map(moved)
    if not sample.host:
        return there
    stay = lambda i, x: sample.args[i] if i in sample.host else x
    return dataclasses.replace(there, args=tuple(stay(i, x) for i, x in enumerate(there.args)))


def tensor_to_jax(t: torch.Tensor) -> torch.Tensor:
    """One CPU tensor on device jax, with its geometry."""
    return _carrier(_transfer)(t)


def upcast(sample: Sample) -> Sample:
    """A copy on CPU in double precision, tensors and dtype arguments."""

    def widened(x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return UPCAST.get(x, x)
        if isinstance(x, torch.Tensor) and x.dtype in UPCAST:
            return x.detach().to(UPCAST[x.dtype]).requires_grad_(x.requires_grad)
        return x

    return fresh(sample).map(widened)


# Transformations --------------------------------------------------------------------------------------------------


def noncontiguous(sample: Sample) -> Sample:
    """The sample with no tensor contiguous; what lies between the elements is not to be read."""

    def stretched(t: torch.Tensor) -> torch.Tensor:
        if not t.is_contiguous():
            return t
        plain = _plain(t)
        number = plain.is_floating_point() or plain.is_complex()
        wide = torch.full((*plain.shape, 2), float("nan") if number else True, dtype=plain.dtype)
        wide[..., 0] = plain
        return _marked(wide[..., 0], t).requires_grad_(t.requires_grad)

    return sample.map(lambda x: stretched(x) if isinstance(x, torch.Tensor) else x)


def conjugated(sample: Sample) -> Sample:
    """The sample with the same values behind conj bits."""
    if not any(t.is_complex() for t in sample.tensors()):
        raise Inapplicable("no complex tensor")
    keep = lambda t: torch.conj_physical(t.detach()).conj().requires_grad_(t.requires_grad)
    return sample.map(lambda x: keep(x) if isinstance(x, torch.Tensor) and x.is_complex() else x)


def negated(sample: Sample) -> Sample:
    """The sample with the same values behind neg bits."""
    wide = lambda x: isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
    if not any(map(wide, sample.tensors())):
        raise Inapplicable("no float tensor")
    return sample.map(lambda x: torch._neg_view(-x.detach()).requires_grad_(x.requires_grad) if wide(x) else x)


def chosen(items: tuple[Sample, ...], limit: int | None, turn: int = 0) -> Iterator[tuple[int, Sample]]:
    """At most `limit` samples with their positions; another `turn` gives others."""
    for i in spread(len(items), limit):
        at = (i + turn) % len(items)
        yield at, items[at]
