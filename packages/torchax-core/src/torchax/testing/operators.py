"""Any operator or function, with the attributes by which the engine drives PyTorch's OpInfos."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree

from .. import _lookup
from .._registry import op_name
from .._twins import functional_twin


class Tolerance(NamedTuple):
    """How far values may be apart, as `torch.testing.assert_close` counts it."""

    rtol: float
    atol: float


@dataclasses.dataclass(eq=False)
class Operator:
    """An operator to compare; the attributes that follow `tolerances` are found out from its schema.

    Attributes:
        fn: what is called: an overload, or any function of tensors.
        full_name: what it is called in messages.
        reference: what is called for tensors on CPU; None for `fn` itself.
        values: whether values are compared, not only shapes, dtypes and strides (random results).
        tolerances: by dtype, where torch.testing's own are too narrow.
    """

    fn: Callable[..., Any]
    full_name: str
    reference: Callable[..., Any] | None = None
    values: bool = True
    tolerances: Mapping[torch.dtype, Tolerance] = dataclasses.field(default_factory=dict)
    inplace_variant: Callable[..., Any] | None = None
    out_variant: Any = None
    method_variant: None = None
    is_factory_function: bool = False
    variant_test_name: str = ""

    @property
    def name(self) -> str:
        """The name without a variant, of which there is none here."""
        return self.full_name

    @property
    def supports_out(self) -> bool:
        """Whether there is an ``out=`` form."""
        return self.out_variant is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator, its ``out=`` form, or the reference where all tensors are on CPU."""
        if "out" in kwargs and self.out_variant is not None:
            outs = kwargs.pop("out")
            names = [a.name for a in self.out_variant._schema.arguments if a.is_out]
            outs = (outs,) if isinstance(outs, torch.Tensor) else outs
            return self.out_variant(*args, **kwargs, **dict(zip(names, outs, strict=True)))
        if self.reference is not None and not any(_on_jax(x) for x in pytree.tree_leaves((args, kwargs))):
            return self.reference(*args, **kwargs)
        return self.fn(*args, **kwargs)

    def get_op(self) -> Callable[..., Any]:
        """The function of which gradients are taken."""
        return self

    def gradcheck_wrapper(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The function of which gradients are taken, called."""
        return op(*args, **kwargs)


def _on_jax(x: Any) -> bool:
    return (isinstance(x, torch.Tensor) and x.device.type == "jax") or (
        isinstance(x, str | torch.device) and str(x).startswith("jax")
    )


def overload(op: Any) -> Any | None:
    """The overload that `op` names: itself, that of a custom op, or by name; None for other functions.

    Raises:
        ValueError: there is no such op, or several overloads.
    """
    if isinstance(op, torch._ops.OpOverload):
        return op
    if isinstance(op, torch.library.CustomOpDef):
        return op._opoverload
    if not isinstance(op, str | torch._ops.OpOverloadPacket):
        return None
    name = op_name(op)
    found = _lookup.find(name)
    if not found:
        near = _lookup.closest(name)
        hint = f"did you mean {', '.join(near)}? Else import" if near else "import"
        raise ValueError(f"torch has no operator {name!r}; {hint} the library that defines it")
    functional = [func for func in found if not func._schema.is_mutable] or found
    if len(functional) > 1:
        exact = [func for func in functional if func.name() == name]
        if len(exact) != 1:
            listed = ", ".join(func.name() for func in functional)
            raise ValueError(f"{name} has several overloads; name one of {listed}")
        functional = exact
    return functional[0]


def operator(op: Any, **attributes: Any) -> Operator:
    """`op` as an `Operator`: an overload, its name, a packet with one overload, a custom op, or any function of tensors.

    In-place and ``out=`` forms are those that torch has of the overload.

    Raises:
        TypeError: `op` cannot be called.
        ValueError: there is no operator of that name.
    """
    if isinstance(op, Operator):
        return op
    found = overload(op)
    if found is None:
        if not callable(op):
            raise TypeError(f"expected an operator, its name or a function of tensors; got {op!r}")
        name = f"{getattr(op, '__module__', '')}.{getattr(op, '__qualname__', repr(op))}".lstrip(".")
        return Operator(op, name, **attributes)
    name = found.name()
    schema = found._schema
    takes_tensors = any("Tensor" in str(a.type) for a in schema.arguments)
    return Operator(
        found,
        schema.name.removeprefix("aten::"),
        inplace_variant=_twin_of(found, inplace=True),
        out_variant=_twin_of(found, inplace=False),
        is_factory_function=not takes_tensors and any(a.name == "device" for a in schema.arguments),
        **attributes,
    )


def _twin_of(func: Any, inplace: bool) -> Any | None:
    """The in-place or ``out=`` form of an overload."""
    namespace, name = func._schema.name.split("::")
    ops = getattr(torch.ops, namespace)
    packet = getattr(ops, name + "_" if inplace else name, None)
    if packet is None or func._schema.is_mutable:
        return None
    for other in packet.overloads():
        candidate = getattr(packet, other)
        writes_out = any(a.is_out for a in candidate._schema.arguments)
        if writes_out is not inplace and candidate._schema.is_mutable and functional_twin(candidate) is func:
            return candidate
    return None
