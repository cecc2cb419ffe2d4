"""The device ``jax`` itself: all that touches torch's internals.

Python knows the device as ``jax`` (torch's privateuse1, renamed); the tensors' own C++ device is ``lazy``. So
factories and composite kernels are registered for both keys.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental import proxy_tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _foreach_supported_types
from torch.utils import _foreach_utils
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from . import _accelerator, _core_ops, _loading, _uninitialized, amp, convert, device
from ._dispatch import RULES
from ._registry import REGISTRY
from ._whole import whole_kernel, whole_out_kernel
from .tensor import OWN, Tensor

_KEYS = ("PrivateUse1", "Lazy")
_libraries: list[torch.library.Library] = []
_refusing: list[torch.library.Library] = []
_keeping: list[torch.library.Library] = []
_autograd: torch.library.Library | None = None
_registered: set[str] = set()
_examined: set[str] = set()  # known to be factories, or none
_CORE_FACTORIES = ("aten::empty.memory_format", "aten::empty_strided")


def install() -> None:
    """Make the device known to torch; once per process."""
    global _autograd
    if _libraries:
        return
    _setup_privateuseone_for_python_backend("jax", backend_module=device)
    sys.modules.setdefault("torch.jax", device)
    torch.jax = device  # type: ignore[attr-defined]
    _libraries.extend(torch.library.Library("aten", "IMPL", key) for key in _KEYS)
    _autograd = torch.library.Library("aten", "IMPL", "AutogradLazy")
    _register_composite_outs()
    for name in _CORE_FACTORIES:
        _register_factory(name)
    _libraries[1].impl("_efficientzerotensor", _efficient_zeros)
    for library in _libraries:
        library.impl("_copy_from", _copy_from)
    for key, name in _UNSUPPORTED:
        library = torch.library.Library("aten", "IMPL", key)
        library.impl(name, _refuse)
        _refusing.append(library)
    _accelerator.install()
    _foreach_utils._get_foreach_kernels_supported_devices = _foreach_devices(
        _foreach_utils._get_foreach_kernels_supported_devices
    )
    proxy_tensor.HANDLED_TYPES += (
        Tensor,
    )  # else `make_fx` (torch.func.linearize) takes what is computed for constants
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign]
    amp.install()
    _loading.install()
    _uninitialized.install()
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    if Tensor not in _foreach_supported_types:
        _foreach_supported_types.append(Tensor)


def register_kernels() -> None:
    """Kernels for what `__torch_dispatch__` does not see by itself: factories, and composite ops kept whole."""
    for entry in REGISTRY.all():
        if entry.op in _registered:
            continue
        if entry.whole:
            if _autograd is not None and _exists(entry.op):
                _registered.add(entry.op)
                namespace, name = entry.op.split("::")
                library = _autograd if namespace == "aten" else torch.library.Library(namespace, "IMPL", "AutogradLazy")
                library.impl(name, whole_kernel(_overload(entry.op)))
                _keeping.append(library)
        elif (
            entry.kind in ("functional", "stateful", "dynamic")
            and entry.op not in _examined
            and _register_if_factory(entry.op)
        ):
            _examined.add(entry.op)


def _register_composite_outs() -> None:
    """Kernels for the ``out=`` forms that torch would take apart; see `whole_out_kernel`."""
    assert _autograd is not None
    for schema in torch._C._jit_get_all_schemas():
        name = f"{schema.name}.{schema.overload_name}"
        if (
            schema.name.startswith("aten::")
            and any(a.is_out for a in schema.arguments)
            and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
        ):
            _autograd.impl(name.removeprefix("aten::"), whole_out_kernel(name, _overload))


def _overload(name: str) -> Any:
    namespace, rest = name.split("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def _register_if_factory(name: str) -> bool:
    """Whether the op is defined, so that it need not be looked at again; a factory gets its kernels."""
    schema = torch._C._get_schema(*_split(name)) if _exists(name) else None
    if schema is None:
        return False
    takes_tensor = any("Tensor" in str(a.type) for a in schema.arguments)
    if not takes_tensor and any(a.name == "device" for a in schema.arguments):
        _register_factory(name)
    return True


def _split(name: str) -> tuple[str, str]:
    packet, _, overload = name.partition(".")
    return packet, overload


def _exists(name: str) -> bool:
    packet, overload = _split(name)
    try:
        torch._C._get_schema(packet, overload)
    except RuntimeError:
        return False
    return True


def _register_factory(name: str) -> None:
    if name in _registered:
        return
    _registered.add(name)
    op = _overload(name)

    def factory(*args: Any, **kwargs: Any) -> Any:
        return RULES[op](args, kwargs)

    for library in _libraries:
        library.impl(name.removeprefix("aten::"), factory)


def _copy_from(src: torch.Tensor, dst: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What ``copy_`` comes to where torch keeps `__torch_dispatch__` out (``torch.tensor(..., device="jax")``)."""
    return _core_ops.copy_((dst, src), {})


def _foreach_devices(known: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """C++ groups tensors by its own name of their device."""
    return lambda: [*known(), "lazy"]


_torch_pin_memory = torch.Tensor.pin_memory


def _pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    """`torch.Tensor.pin_memory`: JAX reads pageable memory, so a CPU tensor stays as it is where ``jax`` is the accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    if self.device.type == "cpu" and accelerator is not None and accelerator.type == "jax":
        return self
    return _torch_pin_memory(self) if device is None else _torch_pin_memory(self, device)


# where tensors that are not dense arrive on their way to the device
_UNSUPPORTED = (
    ("SparsePrivateUse1", "_to_copy"), ("SparseCsrPrivateUse1", "_to_copy"), ("QuantizedPrivateUse1", "_to_copy"),
    ("NestedTensorPrivateUse1", "_to_copy"), ("SparsePrivateUse1", "empty.memory_format"), ("SparsePrivateUse1", "zeros"),
    ("SparseCsrPrivateUse1", "empty.memory_format"), ("QuantizedPrivateUse1", "empty.memory_format"),
)  # fmt: skip


def _refuse(first: Any, *args: Any, **kwargs: Any) -> Any:
    """No `jax.Array` can hold it."""
    if isinstance(first, torch.Tensor):
        convert.check_dense(first)
    _core_ops.refuse_layout(kwargs.get("layout"))


def _efficient_zeros(size: Any, **kwargs: Any) -> torch.Tensor:
    """Forward-mode AD asks for it; a tensor of zeros does."""
    return RULES[torch.ops.aten.empty.memory_format]((size,), {"dtype": kwargs.get("dtype")})


# ---------------------------------------------------------------------- Module.to
# torch makes a new Parameter for every name when a conversion changes the kind of tensor: tied weights come apart and optimizers keep
# the old ones. So: keep the object where torch can swap it (it cannot while a graph holds it), and the tie in any case.
_torch_apply: Callable[..., Any] = torch.nn.Module._apply
_moving = threading.local()


def _apply(self: torch.nn.Module, fn: Callable[..., Any], recurse: bool = True) -> torch.nn.Module:
    before = {name: p for name, p in self._parameters.items() if p is not None}
    lazy = {name: b for name, b in self._buffers.items() if b is not None and is_lazy(b)}
    outermost = not hasattr(_moving, "seen")
    if outermost:
        _moving.seen = {}
    seen = _moving.seen
    try:
        for name in [n for n, p in before.items() if id(p) in seen]:
            self._parameters[name] = None  # moved already, under another name
        try:
            result = _torch_apply(self, lambda t: fn(_uninitialized.empty(t) if is_lazy(t) else t), recurse)
        finally:
            for name, old in before.items():
                if id(old) in seen:
                    self._parameters[name] = seen[id(old)][1]
        for name, old in before.items():
            new: Any = self._parameters[name]
            if id(old) in seen or new is None:
                continue
            if is_lazy(old):
                new = _uninitialized.moved(old, new)
            if new is not old and type(new) is not type(old):
                vars(new).update({k: v for k, v in vars(old).items() if k not in OWN})  # the user's attributes
                try:
                    torch.utils.swap_tensors(old, new)
                    new = old
                except RuntimeError:
                    pass
                self._parameters[name] = new
            seen[id(old)] = (old, new)
        for name, old in lazy.items():
            self._buffers[name] = _uninitialized.moved(old, self._buffers[name])  # type: ignore[arg-type]
        return result
    finally:
        if outermost:
            del _moving.seen
