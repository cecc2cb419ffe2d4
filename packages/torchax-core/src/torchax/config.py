"""Settings. Each is an attribute of `torchax.config`; ``with torchax.config.override(fallback="cpu"):`` sets some for a while."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass
class Option:
    """One setting: its value, what it may be, and who is told of a change."""

    value: Any
    choices: tuple[Any, ...] = ()
    doc: str = ""
    listeners: list[Callable[[Any], None]] = dataclasses.field(default_factory=list)


class Config:
    """All settings by name; unknown names and values are refused."""

    def __init__(self) -> None:
        object.__setattr__(self, "_options", {})

    def declare(self, name: str, default: Any, *, choices: tuple[Any, ...] = (), doc: str = "") -> None:
        """Add a setting (plugins do so in ``torchax_configure``). Declaring it again keeps its value."""
        self._options.setdefault(name, Option(default, choices, doc))

    def on_change(self, name: str, listener: Callable[[Any], None]) -> None:
        """Call `listener` with the new value whenever the setting changes."""
        self._options[name].listeners.append(listener)

    def options(self) -> dict[str, Option]:
        """All settings."""
        return dict(self._options)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._options[name].value
        except KeyError:
            raise AttributeError(
                f"torchax.config has no setting {name!r}; it has {', '.join(sorted(self._options))}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        option = self._options.get(name)
        if option is None:
            raise AttributeError(f"torchax.config has no setting {name!r}; it has {', '.join(sorted(self._options))}")
        if option.choices and value not in option.choices:
            raise ValueError(
                f"torchax.config.{name} must be one of {', '.join(map(repr, option.choices))}; got {value!r}"
            )
        previous, option.value = option.value, value
        try:
            for listener in option.listeners:
                listener(value)
        except BaseException:
            option.value = previous
            raise

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._options]

    @contextlib.contextmanager
    def override(self, **settings: Any) -> Iterator[None]:
        """Within, the given settings hold; afterwards the previous ones do again."""
        before = {name: getattr(self, name) for name in settings}
        try:
            for name, value in settings.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


def _set_compilation_cache(path: str | os.PathLike[str] | None) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", None if path is None else os.fspath(path))
    if path is not None:  # op-sized programs compile fast and are small: keep them all
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


config = Config()
config.declare(
    "eager",
    "strict",
    choices=("strict", "debug"),
    doc="how ops run outside of compiled functions: 'strict' one compiled program per op, queued; "
    "'debug' waits for every op and names op and line when it fails",
)
config.declare(
    "nan_check",
    False,
    choices=(False, True),
    doc="with eager='debug': raise NaNFound where an op turns finite inputs into NaN",
)
config.declare(
    "fallback",
    "error",
    choices=("error", "cpu"),
    doc="ops that no plugin lowers: 'error', or run them on CPU ('cpu'; slow)",
)
config.declare("compilation_cache", None, doc="folder of JAX's persistent compilation cache, or None")
config.on_change("compilation_cache", _set_compilation_cache)
