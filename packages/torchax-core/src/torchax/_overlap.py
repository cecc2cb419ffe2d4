"""Memory that a written tensor shares with itself or with another operand: what torch refuses to write into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ._infer import on_cpu
from ._storage import TensorMeta, physical_order
from .tensor import Tensor

_MOST = 1 << 18  # bytes of a storage that is made on CPU to ask torch
_WORDS = "to a single memory location"


def relation(a: Tensor, b: Tensor) -> str | None:
    """``full`` or ``partial`` where both lie in the same memory; None where they do not, or where torch finds it too hard to say."""
    if a._s is not b._s:
        return None
    if a is b:
        return "full"
    m, n = a._m, b._m
    if not m.numel or not n.numel or not (_dense(m) and _dense(n)):
        return None
    a_begin, b_begin = a.storage_offset() * m.dtype.itemsize, b.storage_offset() * n.dtype.itemsize
    a_end, b_end = a_begin + m.numel * m.dtype.itemsize, b_begin + n.numel * n.dtype.itemsize
    if (a_begin, a_end) == (b_begin, b_end):
        return "full" if m.strides == n.strides else "partial"
    return "partial" if a_begin < b_end and b_begin < a_end else None


def repeats(meta: TensorMeta) -> bool:
    """Whether elements of a tensor lie in one place, as those of an expanded one do."""
    return meta.numel > 0 and any(
        stride == 0 and size > 1 for size, stride in zip(meta.shape, meta.strides, strict=True)
    )


def relations(
    targets: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any], among_args: bool
) -> tuple[tuple[int, str], ...]:
    """How written tensors, by number, lie in memory: ``repeats``, or as `relation` says for another operand.

    Args:
        targets: the written tensors.
        args: the operands.
        kwargs: those given by name.
        among_args: the written tensors are operands themselves, not ``out=``.
    """
    written = list(_tensors(targets))
    found = [(i, "repeats") for i, t in enumerate(written) if repeats(t._m)]
    storages = {id(t._s) for t in written}
    own = set(range(len(written))) if among_args else set()
    for x in _tensors((*args, *kwargs.values())):
        if id(x._s) in storages:
            for i, t in enumerate(written):
                if x is t and i in own:  # the written operand itself; once more, it is another
                    own.remove(i)
                elif (how := relation(t, x)) is not None:
                    found.append((i, how))
    return tuple(found)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for x in values:
        if type(x) is Tensor:
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def refusal(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: tuple[tuple[int, str], ...]
) -> Exception | None:
    """What CPU torch says to operands that lie in memory as these do; ops differ in what they take."""
    storages: dict[int, torch.Tensor] = {}

    def stand_in(x: Tensor) -> torch.Tensor:
        nbytes, size = x._s.nbytes, x._m.dtype.itemsize
        if nbytes > _MOST:
            raise MemoryError
        flat = storages.setdefault(id(x._s), torch.zeros(nbytes, dtype=torch.uint8))
        flat = flat[: nbytes // size * size].view(x._m.dtype)
        return flat.as_strided(x._m.shape, x._m.strides, x.storage_offset())

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            func(*on_cpu(args, stand_in), **on_cpu(kwargs, stand_in))
    except MemoryError:
        if any(how != "full" for _, how in found):  # as most ops say
            return shared_memory("more than one element of the written-to tensor")
    except Exception as error:
        return error if _WORDS in str(error) else None
    return None


def shared_memory(what: str) -> RuntimeError:
    """torch's error."""
    return RuntimeError(
        f"unsupported operation: {what} {'refers' if what.startswith('more') else 'refer'} to a single memory location. "
        "Please clone() the tensor before performing the operation."
    )


def _dense(meta: TensorMeta) -> bool:
    """Whether a tensor has neither gaps nor repeated elements."""
    if meta.contiguous:
        return True
    n = 1
    for i in reversed(physical_order(meta)):
        if meta.shape[i] != 1:
            if meta.strides[i] != n:
                return False
            n *= meta.shape[i]
    return True
