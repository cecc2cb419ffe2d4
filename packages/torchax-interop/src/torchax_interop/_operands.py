"""What functions of control flow take and give: operands as one list of tensors, checks, words for errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import torch
from torchax._execute import state
from torchax._execute._where import user_line
from torchax._storage import TensorMeta, dense_meta
from torchax.tensor import Tensor

from ._enter import under_jax
from ._regions import Region, cells_of, holding
from ._tree import Spec, flatten, unflatten


class Operands:
    """The operands of functions as one list of tensors.

    Attributes:
        own: those that the user gave.
        lifted: those that the functions close over, and that have a gradient history.
        sliced: position -> dimension that the functions do not see.
    """

    def __init__(self, functions: Sequence[Any], operands: tuple[Any, ...]):
        leaves: list[Any] = []
        self.spec: Spec = flatten(operands, leaves)
        self.leaves = leaves
        self.at = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        self.own = [_on_device(leaves[i]) for i in self.at]
        self.cells = cells_of(*functions)
        self.lifted: list[Tensor] = [c.cell_contents for c in self.cells] if torch.is_grad_enabled() else []
        self.cells = self.cells[: len(self.lifted)]
        self.tensors: list[Tensor] = [*self.own, *self.lifted]
        self.sliced: dict[int, int] = {}

    def arguments(self, growing: int = 0) -> list[tuple[TensorMeta, bool]]:
        """Metadata of what a function sees, and whether it requires a gradient (the first `growing` in any case)."""
        grad = torch.is_grad_enabled()
        found = []
        for i, t in enumerate(self.tensors):
            meta = _without(t._m, self.sliced[i]) if i in self.sliced else t._m
            can = meta.dtype.is_floating_point or meta.dtype.is_complex
            found.append((meta, grad and can and (t.requires_grad or i < growing)))
        return found

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as a function of the list."""

        def call(*tensors: Tensor) -> Any:
            leaves = list(self.leaves)
            n = len(self.own)
            for i, t in zip(self.at, tensors[:n], strict=True):
                leaves[i] = t
            with holding(self.cells, tensors[n:]):
                return fn(*unflatten(self.spec, iter(leaves)))

        return call


def _on_device(t: torch.Tensor) -> Tensor:
    return t if type(t) is Tensor else t.to("jax")  # type: ignore[return-value]


def tracing(*tensors: Any) -> bool:
    """Whether a call with these tensors becomes part of a program."""
    traced = any(type(t) is Tensor and isinstance(t._s.value, jax.core.Tracer) for t in tensors)
    return traced or state.executor.owner is not None or under_jax()


def leaves_of(x: Any) -> list[Any]:
    leaves: list[Any] = []
    flatten(x, leaves)
    return leaves


def map_tensors(fn: Callable[[Any], Any], x: Any) -> Any:
    leaves: list[Any] = []
    spec = flatten(x, leaves)
    return unflatten(spec, iter([fn(t) if isinstance(t, torch.Tensor) else t for t in leaves]))


def _without(meta: TensorMeta, dim: int) -> TensorMeta:
    return dense_meta(meta.shape[:dim] + meta.shape[dim + 1 :], meta.dtype, meta.index)


def stacked(meta: TensorMeta, n: int) -> TensorMeta:
    return dense_meta((n, *meta.shape), meta.dtype, meta.index)


def slices_of(name: str, kind: type[Exception], xs: Any) -> list[torch.Tensor]:
    leaves = leaves_of(xs)
    for x in leaves:
        if not isinstance(x, torch.Tensor):
            raise kind(f"{name}: xs must be a nest of tensors; got {words(x)} in it{user_line()}")
    return leaves


def canonical(name: str, kind: type[Exception], slices: list[torch.Tensor], dim: Any) -> int:
    """The dimension, counted from 0, after torch's checks."""
    if not isinstance(dim, int):
        raise kind(f"{name}: dim must be an int; got {words(dim)}{user_line()}")
    dim = dim + slices[0].ndim if dim < 0 else dim
    sizes = {tuple(t.shape)[dim] if 0 <= dim < t.ndim else 0 for t in slices}
    if 0 in sizes or len(sizes) != 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in slices)
        raise kind(f"{name}: tensors in xs must have dimension {dim}, of one size above 0; got {shapes}{user_line()}")
    return dim


# ---------------------------------------------------------------------- results
def as_tuple(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x if isinstance(x, tuple) else (x,)


def words(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return f"{type(x).__name__} {x!r}"[:80]


def _describe(out: Any) -> str:
    if type(out) is tuple and len(out) == 2 and type(out[0]) is TensorMeta:
        return f"{str(out[0].dtype).removeprefix('torch.')}{list(out[0].shape)}"
    return repr(out)


def check_same_results(a: Region, b: Region) -> None:
    kind = lambda r: [_describe(o) for o in r.outs]
    if a.out_spec != b.out_spec or kind(a) != kind(b):
        raise RuntimeError(
            f"torch.cond: the branches must give the same nest of the same shapes and dtypes; true_fn gives "
            f"({', '.join(kind(a))}), false_fn ({', '.join(kind(b))}){user_line()}"
        )


def check_carry(name: str, fn: str, what: str, flat: Operands, region: Region, n: int | None = None) -> None:
    """A loop's function gives what it takes."""
    n = len(flat.own) if n is None else n
    takes = [_describe((m, False)) for m, _ in flat.arguments()[:n]]
    gives = [_describe(o) for o in region.outs][: n if fn == "combine_fn" and name != "associative_scan" else None]
    if takes != gives:
        raise RuntimeError(
            f"{name}: {fn} must give the shapes and dtypes that it takes; it takes ({', '.join(takes)}) from {what} and gives "
            f"({', '.join(gives)}){user_line()}"
        )


def results_of(region: Region, tensors: Sequence[Any]) -> Any:
    found = iter(tensors)
    leaves = [next(found) if type(o) is tuple and len(o) == 2 and type(o[0]) is TensorMeta else o for o in region.outs]
    return unflatten(region.out_spec, iter(leaves))
