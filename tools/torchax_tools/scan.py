"""The operators of a model, recorded without computing it."""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import logging
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .coverage import classify

_NO_WORK = ("aten::detach", "prim::")  # what recording itself adds, and questions about metadata


class BadProgram(ValueError):
    """There is nothing to scan: the message says why."""


class _Recorder(TorchDispatchMode):
    """Counts operators as they reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[Any] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload):
            self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def load_factory(text: str) -> Callable[[], Any]:
    """What ``MODULE:FACTORY`` names; a file's path will do for the module.

    Raises:
        BadProgram: it cannot be imported, has no such name, or that is not callable.
    """
    module_name, colon, attribute = text.rpartition(":")
    if not colon or not module_name or not attribute:
        raise BadProgram(
            f"{text!r}: write MODULE:FACTORY, e.g. my_package.models:make, or the path of a saved program (.pt2)"
        )
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = _file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except BadProgram:
        raise
    except ModuleNotFoundError as error:
        raise BadProgram(f"{text}: no module {error.name!r}") from None
    except (Exception, SystemExit) as error:
        raise BadProgram(f"{text}: its import failed: {type(error).__name__}: {error}") from None
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except Exception as error:
            raise BadProgram(f"{text}: {found!r} has no attribute {part!r} ({type(error).__name__}: {error})") from None
    if not callable(found):
        raise BadProgram(f"{text} is a {type(found).__name__}, not callable: name a function that makes the model")
    return found


def _file(name: str) -> Any:
    """A file as a module of its own name, also where that is the name of another one that is imported, ``json.py``."""
    path = pathlib.Path(name).resolve()
    if not path.is_file():
        raise BadProgram(f"{name}: no such file")
    sys.path.insert(0, str(path.parent))
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    own = path.stem if loaded is None else f"_scanned_{path.stem}"
    spec = importlib.util.spec_from_file_location(own, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[own] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[own]
        raise
    return module


def program_of(made: Any, text: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What a factory made, as a callable and its arguments."""
    if isinstance(made, tuple) and 0 < len(made) <= 3 and callable(made[0]):
        function, args, kwargs = {1: (*made, (), {}), 2: (*made, {}), 3: made}[len(made)]
        if isinstance(args, dict):
            args, kwargs = (), args
        if isinstance(args, torch.Tensor):
            args = (args,)
        if isinstance(args, tuple | list) and isinstance(kwargs, dict):
            return function, tuple(args), kwargs
    if isinstance(made, torch.nn.Module):
        inputs = getattr(made, "dummy_inputs", None)  # of transformers' models
        if isinstance(inputs, dict):
            return made, (), inputs
    elif callable(made) and not isinstance(made, tuple):
        return made, (), {}
    raise BadProgram(
        f"{text} made {type(made).__name__}; expected (callable, arguments), (callable, arguments, keywords), or a function "
        "without arguments. A module alone does not say what it is called with"
    )


def record_factory(text: str, backward: bool = False, real: bool = False) -> collections.Counter[Any]:
    """The operators that the program of ``MODULE:FACTORY`` calls, and how often.

    Parameters and inputs are tensors without values, so that nothing is computed or allocated.

    Args:
        text: ``MODULE:FACTORY``.
        backward: also those of the gradients of every floating-point result.
        real: compute on CPU, for programs that look at values.

    Raises:
        BadProgram: see `load_factory`, or the program fails.
    """
    factory = load_factory(text)
    mode = contextlib.nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder()
    hint = "" if real else ". What looks at values is scanned with --real"
    with mode, contextlib.redirect_stdout(sys.stderr):  # stdout is for results
        try:
            made = factory()
        except (Exception, SystemExit) as error:
            raise BadProgram(f"{text} failed: {type(error).__name__}: {_brief(error)}{hint}") from None
        function, args, kwargs = program_of(made, text)
        try:
            with recorder:
                out = function(*args, **kwargs)
                if backward:
                    leaves = [t for t in pytree.tree_leaves(_fields(out)) if isinstance(t, torch.Tensor)]
                    outputs = [t for t in leaves if t.requires_grad]
                    if not outputs:
                        raise BadProgram(f"{text}: no result requires a gradient")
                    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        except BadProgram:
            raise
        except (Exception, SystemExit) as error:
            raise BadProgram(f"{text}: the program failed: {type(error).__name__}: {_brief(error)}{hint}") from None
    return recorder.calls


def _fields(out: Any) -> Any:
    return dict(out.items()) if hasattr(out, "items") else out


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else ""


def record_export(path: pathlib.Path) -> collections.Counter[Any]:
    """The operators in a program that `torch.export.save` wrote.

    Raises:
        BadProgram: it cannot be read, or is none.
    """
    if not zipfile.is_zipfile(path):
        raise BadProgram(f"{path} is no program of torch.export: torch.export.save writes .pt2 files")
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # what it would say is said below
    try:
        program = torch.export.load(str(path))
    except Exception as error:
        raise BadProgram(f"{path} is no program of torch.export: {type(error).__name__}: {_brief(error)}") from None
    calls: collections.Counter[Any] = collections.Counter()
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            calls.update(n.target for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
    return calls


def rows(calls: collections.Counter[Any], platform: str | None) -> list[dict[str, Any]]:
    """Each operator: how often it is called, and how it is served; what is missing first."""
    found = []
    for func, count in calls.items():
        if func.name().startswith(_NO_WORK):
            continue
        how = classify(func, platform)
        found.append(
            {
                "op": func.name(),
                "calls": count,
                "how": how.kind,
                "provider": how.provider,
                "family": how.family,
                "conditions": "; ".join(f"{a['plugin']}: {a['condition']}" for a in how.alternatives),
            }
        )
    return sorted(found, key=lambda row: (row["how"] != "missing", -row["calls"], row["op"]))
