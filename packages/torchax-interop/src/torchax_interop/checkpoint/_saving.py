"""Saves that go on in the background."""

from __future__ import annotations

import atexit
import importlib
import pathlib
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any


class Saving:
    """A save that goes on while the program does: what `save_checkpoint` gives with ``wait=False``.

    Attributes:
        path: the checkpoint.
    """

    def __init__(self, path: pathlib.Path, finish: Callable[[], None]):
        self.path = path
        self._error: BaseException | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, args=(finish,), name=f"saving {path}")
        _running[path] = self
        self._thread.start()

    def _run(self, finish: Callable[[], None]) -> None:
        try:
            finish()
        except BaseException as error:
            self._error = error
            warnings.warn(f"saving the checkpoint {self.path} failed: {type(error).__name__}: {error}", stacklevel=1)
        finally:
            if _running.get(self.path) is self:
                del _running[self.path]

    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until the checkpoint is complete.

        Raises:
            Exception: what went wrong in the background. The previous checkpoint is as it was.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error


_running: dict[pathlib.Path, Saving] = {}


def settle(path: pathlib.Path) -> None:
    """Until no save of this path goes on; what went wrong there was warned of."""
    saving = _running.get(path)
    if saving is not None:
        saving._thread.join()


unfinished: weakref.WeakSet[Any] = weakref.WeakSet()  # managers that may be writing


def _settle_all() -> None:
    for saving in list(_running.values()):
        saving._thread.join()
    for manager in list(unfinished):
        manager.wait()


# The end of the program waits. Orbax writes with the help of executors, which end before atexit's functions are called;
# what is registered here after them comes before their end.
importlib.import_module("concurrent.futures.thread")
getattr(threading, "_register_atexit", atexit.register)(_settle_all)
