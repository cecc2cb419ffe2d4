"""Files and folders that appear at once, complete; what a killed process leaves behind is cleared by the next one."""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Callable, Mapping

_numbers = itertools.count()
_HOST = re.sub(r"\W", "_", socket.gethostname())


def draft(target: pathlib.Path) -> pathlib.Path:
    """A name beside `target` to write under; it says which process writes."""
    return target.with_name(f".{target.name}.draft-{_HOST}-{os.getpid()}-{next(_numbers)}")


def write_file(target: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Write a file: `write` makes it under another name, then it takes the place of the old one."""
    write_files({target: write})


def write_files(writes: Mapping[pathlib.Path, Callable[[pathlib.Path], object]]) -> None:
    """Write files that belong together: all are made under other names before the first takes its place."""
    drafts = {target: draft(target) for target in writes}
    try:
        for target, write in writes.items():
            write(drafts[target])
            sync(drafts[target])
        for target, temporary in drafts.items():
            os.replace(temporary, target)
    finally:
        for temporary in drafts.values():
            temporary.unlink(missing_ok=True)
    for folder in {target.parent for target in writes}:
        sync(folder)


def replace_folder(new: pathlib.Path, target: pathlib.Path) -> None:
    """Give a complete folder its name. At every moment `standing` finds a complete one, the old or the new."""
    ready, old = _ready(target), target.with_name(f".{target.name}.old")
    os.rename(new, ready)
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        os.rename(target, old)
    os.rename(ready, target)
    sync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def standing(target: pathlib.Path) -> pathlib.Path:
    """Where the checkpoint named `target` is: there, or beside it if a process was killed just while it took its place."""
    ready = _ready(target)
    return ready if not target.exists() and ready.exists() else target


def clear(target: pathlib.Path) -> None:
    """Finish what a killed process left half-done: remove its drafts, complete its exchange of folders."""
    ready = _ready(target)
    if ready.exists():
        if target.exists():
            shutil.rmtree(ready)
        else:
            os.rename(ready, target)
    if not target.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{target.name}.draft-{_HOST}-") + r"(\d+)-\d+(\..*)?")
    for path in list(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _ready(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}.ready")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: pathlib.Path) -> None:
    """Have the contents of a file, or the names in a folder, on the disk before going on."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
