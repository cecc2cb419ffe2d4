"""Tests made from PyTorch's own specification of its operators (OpInfo), for the operators that a plugin lowers.

::

    from torchax.testing import opinfo

    @opinfo.parametrize(plugin="demo", forms=("forward", "grad"))
    def test_opinfo(case):
        opinfo.check(case)

Needs pytest and expecttest (``pip install 'torchax[testing]'``).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .. import plugins
from .._registry import REGISTRY
from ..errors import PluginError
from . import cases
from .cases import FORMS, Case
from .compare import Mismatch
from .engine import Result, run_case


def infos_of(plugin: str) -> list[Any]:
    """PyTorch's OpInfos of the operators that `plugin` lowers, found by name; also those whose backward it lowers.

    Raises:
        PluginError: no plugin of that name is loaded.
    """
    states = {status.name: status.state for status in plugins.status()}
    if states.get(plugin) != "loaded":
        known = ", ".join(f"{name} ({state})" for name, state in states.items()) or "none"
        raise PluginError(f"no plugin {plugin!r} is loaded; found: {known}")
    lowered = {_packet(entry.op) for entry in REGISTRY.all() if entry.provider == plugin and entry.op[:6] == "aten::"}
    return [info for info in cases.ops() if lowered & _names(info)]


def _packet(op: str) -> str:
    return op.removeprefix("aten::").split(".")[0]


def _names(info: Any) -> set[str]:
    """The names of the ATen operators that an OpInfo exercises."""
    plain = info.name.split(".")[-1]
    names = {plain, info.aten_name, info.aten_backward_name, f"{info.aten_name}_backward"}
    names |= {f"{prefix}{name}" for name in list(names) if name for prefix in ("_", "native_")}
    return {name for name in names if name}


def select(
    plugin: str | None = None,
    *,
    infos: Iterable[Any] | None = None,
    forms: Iterable[str] = ("forward", "grad", "inplace", "out", "view"),
    dtypes: Iterable[torch.dtype] | None = None,
) -> list[Case]:
    """The cases (operator, form, dtype) of a plugin's operators.

    Args:
        plugin: its name; its operators must have OpInfos of the same name.
        infos: OpInfos instead, PyTorch's or your own for your own operators.
        forms: of `FORMS`.
        dtypes: None for all that PyTorch claims for CPU.

    Raises:
        PluginError: no plugin of that name is loaded.
        ValueError: neither or both of `plugin` and `infos` are given, no such form, or nothing is selected.
    """
    if (plugin is None) is (infos is None):
        raise ValueError("give plugin= or infos=, one of them")
    forms = tuple(forms)
    if unknown := set(forms) - set(FORMS):
        raise ValueError(f"no form {', '.join(sorted(unknown))}; there are {', '.join(FORMS)}")
    among = infos_of(plugin) if plugin is not None else list(infos or ())
    found = list(cases.enumerate_cases(forms=forms, dtypes=None if dtypes is None else tuple(dtypes), among=among))
    if not found:
        whose = f"plugin {plugin!r}" if plugin is not None else "infos"
        raise ValueError(
            f"PyTorch's OpInfos have no case for {whose} in these forms and dtypes; test with assert_parity"
        )
    return found


def parametrize(
    plugin: str | None = None, *, known: Mapping[str, str] | None = None, **selection: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a test function that takes ``case``: it runs once for each case that `select` gives.

    Args:
        plugin: as for `select`.
        known: differences that are known: a glob over names of cases (``"softplus/grad/*"``) to the reason. They are
            expected to fail, strictly.
        selection: further arguments of `select`.
    """
    import pytest

    found = select(plugin, **selection)
    reasons = [next((why for glob, why in (known or {}).items() if fnmatch.fnmatch(c.name, glob)), None) for c in found]
    for glob in known or {}:
        if not any(fnmatch.fnmatch(case.name, glob) for case in found):
            raise ValueError(f"known difference {glob!r} matches no case; the first is {found[0].name!r}")
    parameters = [
        pytest.param(case, id=case.name, marks=() if why is None else (pytest.mark.xfail(reason=why, strict=True),))
        for case, why in zip(found, reasons, strict=True)
    ]
    return pytest.mark.parametrize("case", parameters)


def check(case: Case, samples: int | None = 4, timeout: float | None = 60) -> Result:
    """Run a case on at most `samples` samples, spread evenly over all that OpInfo has; None for all.

    Raises:
        Mismatch: an AssertionError that says which sample differs, and how.
    """
    result = run_case(case, samples, timeout)
    if result.status == "fail":
        raise Mismatch(f"{case.name}: {result.reason}")
    if result.status == "skip":
        import pytest

        pytest.skip(f"{case.name}: {result.reason}")
    return result
