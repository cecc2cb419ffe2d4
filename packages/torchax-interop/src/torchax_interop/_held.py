"""What a program has written, kept as JAX gave it until somebody asks: a step that follows a step touches no tensor.

Storing each array in its storage and fetching it again for the next call costs more than the rest of a call with hundreds of
parameters. So storages that a program writes turn into `HeldStorage`s, which know where their payload is; the first read or write
of one of them, by whomever, settles all.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from torchax._storage import Storage

_lock = threading.RLock()
_LONG = 8  # calls in a row: holding has paid


class Held:
    """The payloads of `storages` while nobody has asked for them.

    It knows them weakly: what a held storage needs of it are the arrays alone.

    Attributes:
        arrays: the payloads in the order of `storages`; None while these have them.
    """

    def __init__(self, storages: Sequence[Storage]):
        self._storages = list(map(weakref.ref, storages))
        self.arrays: Sequence[Any] | None = None
        self._calls = 0  # whose results the storages have not seen
        self._wait = self._patience = 1  # calls until holding is tried (again): more where somebody asks all the time

    def keep(self, arrays: Sequence[Any]) -> bool:
        """Hold these payloads, the results of a call; False where the storages are to be given them."""
        with _lock:
            if self.arrays is None:
                self._wait -= 1
                if self._wait > 0:
                    return False
                storages = self._living()
                for s in filter(None, storages):
                    _ = s.version  # another program may hold it
                if any(s is None or type(s) is not Storage for s in storages):
                    self._wait = self._patience
                    return False
                for s in storages:
                    s.owner, s.held = None, self
                    s.__class__ = HeldStorage  # from here on readers wait
                    s.__dict__.pop("value", None)
            self.arrays = arrays
            self._calls += 1
            return True

    def settle(self) -> None:
        """Give the storages their payloads."""
        with _lock:
            if self.arrays is None:
                return
            for s, array in zip(self._living(), self.arrays, strict=True):
                if s is not None:
                    values = s.__dict__
                    values["value"], values["version"] = array, values.get("version", 0) + self._calls
                    s.__class__, s.held = Storage, None  # all is there, for those who do not wait
            self._patience = 1 if self._calls >= _LONG else min(2 * self._patience, 64)
            self._wait, self._calls, self.arrays = self._patience, 0, None

    def _living(self) -> list[Any]:
        return [ref() for ref in self._storages]


class HeldStorage(Storage):
    """A storage whose payload a `Held` has; it is a plain one as soon as it is asked for."""

    held: Held | None

    def _settle(self) -> None:
        held = self.held
        if held is not None:  # else another thread has done it meanwhile
            held.settle()

    @property
    def value(self) -> Any:  # type: ignore[override]
        self._settle()
        return self.value

    @value.setter
    def value(self, value: Any) -> None:
        self._settle()
        self.value = value

    @property
    def version(self) -> int:  # type: ignore[override]
        self._settle()
        return self.version

    @version.setter
    def version(self, version: int) -> None:
        self._settle()
        self.version = version
