"""The name by which existing users of torchax ask whether a tensor is a view: ``isinstance(t, torchax.view.View)``."""

from __future__ import annotations

from typing import Any

from .tensor import Tensor


class _IsView(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return type(instance) is Tensor and instance._v is not None


class View(metaclass=_IsView):
    """Every tensor on device ``jax`` that shows a part, or another arrangement, of another one's storage."""
