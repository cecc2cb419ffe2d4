"""`torchax-ops new-plugin`: a distribution with a plugin that works, to be changed into one's own."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.resources.abc
import os
import pathlib
import re
import shutil
import string
import tempfile

from .output import umask

PREFIX = "torchax-ops-"
API = "1.0"  # of `torchax.plugins.API_VERSION`, without importing torch


class Refused(ValueError):
    """A plugin cannot be made."""


def files(name: str) -> dict[str, str]:
    """What the distribution of plugin `name` consists of: relative paths to contents.

    Raises:
        Refused: no distribution can be called so.
    """
    name = name.lower().replace("_", "-").removeprefix(PREFIX)
    module = (PREFIX + name).replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise Refused(
            f"{name!r} cannot be a plugin's name: letters, digits and single dashes, a letter first, e.g. my-ops"
        )
    taken = {e.name: e.dist.name if e.dist else "?" for e in importlib.metadata.entry_points(group="torchax.plugins")}
    if name in taken:
        raise Refused(f"a plugin {name!r} is installed already, by {taken[name]}; choose another name")
    values = {"name": name, "distribution": PREFIX + name, "module": module, "api": API}
    root = importlib.resources.files("torchax_tools") / "templates" / "plugin"
    made = {}
    for path, text in _walk(root, ""):
        path = path.removesuffix(".tmpl").replace("src/module/", f"src/{module}/")
        made[path] = string.Template(text).substitute(values)
    return made


def _walk(folder: importlib.resources.abc.Traversable, prefix: str) -> list[tuple[str, str]]:
    found = []
    for item in sorted(folder.iterdir(), key=lambda i: i.name):
        if item.is_dir():
            found += _walk(item, f"{prefix}{item.name}/")
        elif item.name.endswith(".tmpl"):
            found.append((prefix + item.name, item.read_text()))
    return found


def write(name: str, folder: pathlib.Path | None = None) -> tuple[pathlib.Path, list[str]]:
    """Write the distribution of plugin `name` into a new folder, whole or not at all.

    Args:
        name: the plugin's name, with or without ``torchax-ops-``.
        folder: where; default: a folder of the distribution's name in the current one.

    Returns:
        The folder and the relative paths of what was written.

    Raises:
        Refused: the name is bad or the folder exists.
        OSError: it cannot be written.
    """
    made = files(name)
    distribution = next(p for p in made if p.endswith("__init__.py")).split("/")[1].replace("_", "-")
    target = folder if folder is not None else pathlib.Path(distribution)
    if target.exists() or target.is_symlink():
        raise Refused(f"{target} exists; name another folder with --into, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    build = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build.chmod(0o777 & ~umask())
        for path, text in made.items():
            (build / path).parent.mkdir(parents=True, exist_ok=True)
            (build / path).write_text(text)
        os.rename(build, target)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)
        raise
    return target, sorted(made)
