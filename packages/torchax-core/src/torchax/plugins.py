"""The plugin manager: finds plugins through entry points, loads them, and keeps broken ones out of the way."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pluggy

from . import _contract, hookspecs
from ._lookup import closest
from ._registry import REGISTRY
from .config import config
from .errors import PluginError
from .hookspecs import hookimpl

API_VERSION = "1.0"
GROUP = "torchax.plugins"
_TESTED = {
    "torchax-ops-aten",
    "torchax-ops-pallas",
}  # tests hold their parameters: they need not be looked at once more

__all__ = [
    "API_VERSION",
    "GROUP",
    "PluginStatus",
    "disable",
    "enable",
    "faults",
    "hook",
    "hookimpl",
    "register",
    "status",
]


@dataclasses.dataclass
class PluginStatus:
    """What became of a plugin: ``state`` is ``loaded``, ``disabled`` or ``quarantined``; `reason` says why."""

    name: str
    state: str
    reason: str = ""
    distribution: str = ""
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    ops: int = 0


_manager = pluggy.PluginManager("torchax")
_manager.add_hookspecs(hookspecs)
_found: dict[str, PluginStatus] = {}
_objects: dict[str, Any] = {}
hook = _manager.hook
on_load: list[Callable[[], None]] = []  # called when a plugin's ops have been registered


def status() -> list[PluginStatus]:
    """Every plugin that was found, in the order of loading."""
    return list(_found.values())


def load_entry_points() -> None:
    """Load all installed plugins except those named in ``TORCHAX_PLUGINS=-name,-other``. Never raises for a plugin's fault."""
    off = {
        part[1:].strip() for part in os.environ.get("TORCHAX_PLUGINS", "").split(",") if part.strip().startswith("-")
    }
    before = set(_found)
    for entry_point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        if entry_point.name in before:
            continue
        distribution = f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else ""
        first = _found.get(entry_point.name)
        if first is not None:
            if first.distribution != distribution:  # the same one is found twice where sys.path names its folder twice
                name = f"{entry_point.name} ({distribution or 'unknown distribution'})"
                record = _found[name] = PluginStatus(name, "disabled", distribution=distribution)
                _quarantine(record, f"{first.distribution or 'another distribution'} has a plugin of this name")
            continue
        record = _found[entry_point.name] = PluginStatus(entry_point.name, "disabled", distribution=distribution)
        if entry_point.name in off:
            record.reason = "TORCHAX_PLUGINS"
            continue
        try:
            plugin = _import(entry_point)
        except PluginError as error:
            _quarantine(record, str(error))
            continue
        _load(record, plugin, announce=False)
    _announce()


def register(plugin: Any, name: str | None = None) -> None:
    """Load a plugin that is an object at hand (a module, an instance with hooks), as an entry point would.

    Raises:
        PluginError: a plugin of this name is loaded already, or this one is broken.
    """
    name = name or str(getattr(plugin, "__name__", type(plugin).__name__))
    if name in _found and _found[name].state == "loaded":
        raise PluginError(f"a plugin named {name!r} is loaded already; disable it first or pass another name")
    record = _found[name] = PluginStatus(name, "disabled")
    _load(record, plugin, strict=True)


def disable(name: str) -> None:
    """Switch a plugin off: its lowerings are gone until `enable`.

    Raises:
        PluginError: no such plugin.
    """
    record = _get(name)
    if record.state == "loaded":
        _manager.unregister(name=name)
        REGISTRY.remove(name)
        record.ops = 0
    record.state, record.reason = "disabled", "torchax.plugins.disable"


def enable(name: str) -> None:
    """Switch a plugin on again.

    Raises:
        PluginError: no such plugin, or it is broken.
    """
    record = _get(name)
    if record.state == "loaded":
        return
    plugin = _objects.get(name)
    if plugin is None:
        matches = [e for e in importlib.metadata.entry_points(group=GROUP) if e.name == name]
        if not matches:
            raise PluginError(f"plugin {name!r} is not installed any more")
        try:
            plugin = _import(matches[0])
        except PluginError as error:
            _quarantine(record, str(error), warn=False)
            raise PluginError(f"plugin {name!r} cannot be loaded: {error}") from error.__cause__
    _load(record, plugin, strict=True)


def faults(name: str, thorough: bool = False) -> list[str]:
    """What is wrong with the parameters of a loaded plugin's lowerings, one line for each, with file and line.

    Operators that are not defined yet are left out; they are looked at when they are first called.

    Args:
        name: of the plugin.
        thorough: look also at functions for which that takes long, for operators that torch does not have, and for a plugin
            without hooks, as `torchax-ops doctor` does.
    """
    found = []
    if thorough and name in _objects and not _manager.get_hookcallers(_objects[name]):
        found.append("it has no hook, so it does nothing: mark its functions with @torchax.hookspecs.hookimpl")
    for entry in REGISTRY.of(name):
        schema = _contract.schema_of(entry.op)
        if schema is None:
            REGISTRY.undefined.add(entry.op)
            if thorough and entry.op.startswith(("aten::", "prims::")):  # nobody will define it
                found.append(f"{entry.op}: torch has no such operator; did you mean {', '.join(closest(entry.op))}?")
        elif wrong := _contract.fault(entry, schema, thorough):
            found.append(wrong)
    return found


def _import(entry_point: importlib.metadata.EntryPoint) -> Any:
    try:
        return entry_point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: a plugin must not end the host program
        raise PluginError(f"its import failed: {type(error).__name__}: {error}") from error


def _get(name: str) -> PluginStatus:
    if name not in _found:
        raise PluginError(f"no plugin named {name!r}; found: {', '.join(_found) or 'none'}")
    return _found[name]


def _announce() -> None:
    for listener in on_load:
        listener()


def _load(record: PluginStatus, plugin: Any, strict: bool = False, announce: bool = True) -> None:
    name = record.name
    try:
        _manager.register(plugin, name=name)
        _objects[name] = plugin
        others = [p for p in _manager.get_plugins() if p is not plugin]
        calling = lambda hook_name, **kw: _manager.subset_hook_caller(hook_name, others)(**kw)
        infos = calling("torchax_plugin_info")
        info = infos[0] if infos else {}
        if not isinstance(info, Mapping):
            raise PluginError(
                f"its torchax_plugin_info gives {info!r}; expected a dict with name, version, api, summary and url"
            )
        record.info = dict(info)
        major = str(record.info.get("api", API_VERSION)).split(".")[0]
        if major != API_VERSION.split(".")[0]:
            raise PluginError(
                f"it was written for core API {record.info.get('api')}, this is {API_VERSION}; upgrade the plugin"
            )
        calling("torchax_configure", config=config)
        with REGISTRY.providing(name):
            calling("torchax_register_ops", registry=REGISTRY)
        _manager.check_pending()
        if record.distribution.split(" ")[0] not in _TESTED and (wrong := faults(name)):
            others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise PluginError(wrong[0] + others)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if _manager.has_plugin(name):
            _manager.unregister(name=name)
        REGISTRY.remove(name)
        reason = str(error) if isinstance(error, PluginError) else f"it raised {type(error).__name__}: {error}"
        _quarantine(record, reason, warn=not strict)
        if strict:
            raise PluginError(f"plugin {name!r} cannot be loaded: {reason}") from error
        return
    if announce:
        _announce()
    record.state, record.reason = "loaded", ""
    record.ops = len({e.op for e in REGISTRY.of(name)})


def _quarantine(record: PluginStatus, reason: str, warn: bool = True) -> None:
    record.state, record.reason = "quarantined", reason
    if warn:
        warnings.warn(
            f"torchax plugin {record.name!r} ({record.distribution or 'unknown distribution'}) is skipped: {reason}. "
            f"Switch it off with TORCHAX_PLUGINS=-{record.name} to silence this.",
            RuntimeWarning,
            stacklevel=3,
        )
