"""`torchax-ops doctor`: what is installed, and does it work."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform

from . import mistakes

DISTRIBUTIONS = ("torchax", "torchax-core", "torchax-ops-aten", "torchax-interop", "torchax-ops-pallas")
OPTIONAL = {"torchax-ops-pallas": "pip install 'torchax[pallas]' for the Pallas kernels"}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def line(what: str, state: str, detail: str, remedy: str = "") -> dict[str, str]:
    """One check: `state` is ``ok``, ``note`` or ``wrong``."""
    return {"what": what, "state": state, "detail": detail, "remedy": remedy}


def _error(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def examine() -> list[dict[str, str]]:
    """All checks, each with ``what``, ``state`` (``ok``, ``note`` or ``wrong``), ``detail`` and ``remedy``."""
    lines = [line("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    lines += _distributions()
    lines += _foundations()
    lines += mistakes.of_installation()
    try:
        import jax
        import torchax

        devices = jax.devices()
    except Exception as error:
        remedy = "" if "backend" not in str(error) else "unset JAX_PLATFORMS, or name a platform that is here"
        return [*lines, line("import torchax", "wrong", _error(error), remedy)]
    kinds = ", ".join(sorted({d.device_kind for d in devices}))
    lines.append(line("devices", "ok", f"{len(devices)} x {devices[0].platform} ({kinds})"))
    lines += mistakes.of_environment(devices[0].platform)
    lines += _plugins()
    changed = {name: option.value for name, option in torchax.config.options().items() if option.value is not None}
    lines.append(line("torchax.config", "ok", ", ".join(f"{k}={v!r}" for k, v in changed.items())))
    lines.append(_training_step(compiled=False))
    lines.append(_training_step(compiled=True))
    return lines


def _distributions() -> list[dict[str, str]]:
    lines = []
    core = _version("torchax-core")
    for name in DISTRIBUTIONS:
        version = _version(name)
        if version is None:
            state = "note" if name in OPTIONAL else "wrong"
            lines.append(line(name, state, "not installed", OPTIONAL.get(name, f"pip install {name}")))
        elif version != core:
            remedy = f"pip install -U {name}=={core}"
            lines.append(line(name, "wrong", f"{version}, but torchax-core is {core}", remedy))
        else:
            lines.append(line(name, "ok", version))
    return lines


def _foundations() -> list[dict[str, str]]:
    """torch, jax and what they run on, against what torchax-core was tested with."""
    lines = []
    wanted = mistakes.ranges("torchax-core")
    for name in ("torch", "jax", "jaxlib", "libtpu"):
        version = _version(name)
        if version is None:
            lines.append(line(name, "ok" if name == "libtpu" else "wrong", "not installed"))
        elif name in wanted and not mistakes.within(version, wanted[name]):
            remedy = f"pip install '{name}{wanted[name]}'"
            lines.append(line(name, "wrong", f"{version}; torchax-core was tested with {wanted[name]}", remedy))
        else:
            lines.append(line(name, "ok", version))
    return lines


def _plugins() -> list[dict[str, str]]:
    from torchax import plugins

    lines = []
    for status in plugins.status():
        state = {"loaded": "ok", "disabled": "note"}.get(status.state, "wrong")
        detail = f"{status.state}, {status.ops} ops" if status.state == "loaded" else f"{status.state}: {status.reason}"
        detail += f" ({status.distribution})" if status.distribution else ""
        owner = status.distribution.split(" ")[0]
        remedy = {
            "ok": "",
            "note": "TORCHAX_PLUGINS or the program switched it off",
            "wrong": f"pip install -U {owner or 'it'}, uninstall it, or set TORCHAX_PLUGINS=-{status.name}",
        }[state]
        lines.append(line(f"plugin {status.name}", state, detail, remedy))
        if status.state == "loaded":
            report = f"report it to the author of {owner or status.name}"
            wrong = plugins.faults(status.name, thorough=True)
            lines += [line(f"plugin {status.name}", "wrong", fault, report) for fault in wrong]
    lines += _ties()
    if not any(s.state == "loaded" for s in plugins.status()):
        lines.append(line("plugins", "wrong", "none is loaded, so no op runs", "pip install torchax-ops-aten"))
    return lines


def _ties() -> list[dict[str, str]]:
    """Operators that two plugins want alike, whatever the arguments: a call of one raises."""
    from torchax.ops import REGISTRY

    lines = []
    for op in REGISTRY.ops():
        for a, b in itertools.pairwise(REGISTRY.lowerings(op)):
            if a.priority != b.priority or a.provider == b.provider or a.when is not None or b.when is not None:
                continue
            alike = not (a.platforms and b.platforms) or set(a.platforms) & set(b.platforms)
            if alike and (not (a.dtypes and b.dtypes) or set(a.dtypes) & set(b.dtypes)):
                both = f"plugins {a.provider} and {b.provider} lower it with the same priority {a.priority}"
                remedy = f"TORCHAX_PLUGINS=-{a.provider} or -{b.provider}"
                lines.append(line(op, "wrong", f"{both}: a call raises an error", remedy))
    return lines


def _training_step(compiled: bool) -> dict[str, str]:
    """Two steps of a tiny model on both devices; the losses must agree."""
    import copy

    import torch
    import torchax

    what = "a compiled training step" if compiled else "an eager training step"

    def losses(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, wrap: bool) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = torchax.compile(step) if wrap else step
        return [float(run(x, y)) for _ in range(3)]

    try:
        state = torch.get_rng_state()
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        x, y = torch.randn(4, 8), torch.arange(4)
        torch.set_rng_state(state)
        ours = losses(copy.deepcopy(model).to("jax"), x.to("jax"), y.to("jax"), compiled)
        theirs = losses(model, x, y, False)
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if worst > 1e-2:
            return line(what, "wrong", f"losses {ours} differ from torch's on CPU, {theirs}")
        return line(what, "ok", f"three losses agree with torch on CPU within {worst:.1e}")
    except Exception as error:
        return line(what, "wrong", _error(error))
