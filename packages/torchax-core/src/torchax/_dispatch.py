"""Where every op on a jax tensor arrives: op -> rule, one dict look-up; the first time, the rule is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Rules(dict[Any, Callable[..., Any]]):
    """How each op (an overload) is carried out: ``RULES[func](args, kwargs)``."""

    def __missing__(self, func: Any) -> Callable[..., Any]:
        from ._rules import make_rule

        rule = self[func] = make_rule(func)
        return rule


RULES = Rules()


def dispatch(cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """`Tensor.__torch_dispatch__`."""
    return RULES[func](args, kwargs or {})
