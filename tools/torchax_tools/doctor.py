"""`torchax-ops doctor`: what is installed, and does it work."""

from __future__ import annotations

import importlib.metadata
import os
import platform

DISTRIBUTIONS = ("torchax", "torchax-core", "torchax-ops-aten", "torchax-interop", "torchax-ops-pallas")
OPTIONAL = {"torchax-ops-pallas": "pip install 'torchax[pallas]' adds the Pallas kernels"}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(what: str, state: str, detail: str) -> dict[str, str]:
    return {"what": what, "state": state, "detail": detail}


def _error(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def examine() -> list[dict[str, str]]:
    """All checks, each with ``what``, ``state`` (``ok``, ``note`` or ``wrong``) and ``detail``."""
    lines = [_line("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    versions = {name: _version(name) for name in DISTRIBUTIONS}
    core = versions["torchax-core"]
    for name, version in versions.items():
        if version is None:
            state = "note" if name in OPTIONAL else "wrong"
            lines.append(_line(name, state, f"not installed; {OPTIONAL.get(name, f'pip install {name}')}"))
        elif version != core:
            lines.append(_line(name, "wrong", f"{version}, but torchax-core is {core}: pip install -U {name}=={core}"))
        else:
            lines.append(_line(name, "ok", version))
    lines += [_line(name, "ok", _version(name) or "not installed") for name in ("torch", "jax", "jaxlib")]
    try:
        import jax
        import torchax
        from torchax import plugins

        devices = jax.devices()
        lines.append(_line("devices", "ok", f"{len(devices)} x {devices[0].platform} ({devices[0].device_kind})"))
    except Exception as error:
        lines.append(_line("import torchax", "wrong", _error(error)))
        return lines
    set_by = {
        k: v
        for k, v in os.environ.items()
        if k in ("JAX_PLATFORMS", "XLA_FLAGS", "TORCHAX_PLUGINS", "JAX_COMPILATION_CACHE_DIR")
    }
    lines += [_line(key, "note", value) for key, value in set_by.items()]
    for status in plugins.status():
        state = {"loaded": "ok", "disabled": "note"}.get(status.state, "wrong")
        detail = f"{status.state}, {status.ops} ops" if status.state == "loaded" else f"{status.state}: {status.reason}"
        lines.append(
            _line(
                f"plugin {status.name}", state, f"{detail} ({status.distribution})" if status.distribution else detail
            )
        )
    if not any(s.state == "loaded" for s in plugins.status()):
        lines.append(_line("plugins", "wrong", "none is loaded, so no op runs: pip install torchax-ops-aten"))
    changed = {name: option.value for name, option in torchax.config.options().items() if option.value is not None}
    lines.append(_line("torchax.config", "ok", ", ".join(f"{k}={v!r}" for k, v in changed.items())))
    lines.append(_training_step(compiled=False))
    lines.append(_training_step(compiled=True))
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
            return _line(what, "wrong", f"losses {ours} differ from torch's on CPU, {theirs}")
        return _line(what, "ok", f"three losses agree with torch on CPU within {worst:.1e}")
    except Exception as error:
        return _line(what, "wrong", _error(error))
