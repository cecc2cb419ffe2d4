"""What a fresh process pays: `import torchax`, and the cold start of each model. Everything runs in subprocesses."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from .measure import Row, failed
from .models import MODELS

_IMPORT = """
import time
import torch, jax
start = time.perf_counter()
import torchax
print(time.perf_counter() - start)
"""

_COLD = """
import json, sys, time
name, cache = sys.argv[1:]
import jax, jax.monitoring, torch, torchax
from torchax_tools.bench.models import MODELS
counts = {"compiled": 0, "seconds": 0.0, "hits": 0}
def on_duration(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        counts["compiled"] += 1
        counts["seconds"] += duration
def on_event(event, **_):
    if event == "/jax/compilation_cache/cache_hits":
        counts["hits"] += 1
jax.monitoring.register_event_duration_secs_listener(on_duration)
jax.monitoring.register_event_listener(on_event)
if cache:
    torchax.config.compilation_cache = cache
torch.manual_seed(0)
model, inputs = MODELS[name]()
model.eval()
def run(model, inputs):
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return out.sum().item()
with torch.no_grad():
    if name.endswith("(transformers)"):
        run(model, inputs)  # transformers imports parts of itself late: not what is measured
    start = time.perf_counter()
    model = model.to("jax")
    inputs = {k: v.to("jax") for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to("jax")
    run(model, inputs)
    total = time.perf_counter() - start
print(json.dumps({"total": total, **counts}))
"""


_PLUGIN = """
from torchax.hookspecs import hookimpl
from torchax.ops import Lowering

@hookimpl
def torchax_plugin_info():
    return {{"name": "{name}", "version": "1", "api": "1.0", "summary": "", "url": ""}}

@hookimpl
def torchax_register_ops(registry):
    for op in registry.ops()[:{ops}]:  # aten's, so that their parameters are looked at
        registry.add(Lowering(op=op, fn=lambda *args, **kwargs: args[0], priority={priority}, platforms=("tpu",)))
"""
_CPU_SECONDS = """
import time
import torch, jax
start = time.process_time()
import torchax
print(time.process_time() - start)
"""


def _run(code: str, *arguments: str, path: str | None = None) -> str:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path, environment.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    if result.returncode:
        said = [
            line for line in result.stderr.splitlines() if re.match(r"[\w.]+: ", line)
        ]  # the exception, not its notes
        raise RuntimeError(said[-1] if said else f"exit {result.returncode}")
    return result.stdout


def imports(rounds: int = 3) -> Iterator[Row]:
    """Seconds that `import torchax` adds to importing torch and jax."""
    try:
        seconds = min(float(_run(_IMPORT)) for _ in range(rounds))
        yield Row("import", "import torchax", seconds, "s", "after torch and jax", 0.6)
    except Exception as error:
        yield failed("import", "import torchax", error)
    yield from plugins()


def plugins(count: int = 10, ops: int = 100, rounds: int = 3) -> Iterator[Row]:
    """Seconds of the processor that installed plugins add to `import torchax`."""
    name = f"{count} plugins with {count * ops:,} lowerings"
    try:
        with tempfile.TemporaryDirectory() as folder:
            _install(pathlib.Path(folder), count, ops)
            without, there = (min(float(_run(_CPU_SECONDS, path=p)) for _ in range(rounds)) for p in (None, folder))
        yield Row("import", name, there - without, "s", "import torchax without them", 0.1)
    except Exception as error:
        yield failed("import", name, error)


def _install(folder: pathlib.Path, count: int, ops: int) -> None:
    for i in range(count):
        name = f"bench{i}"
        (folder / f"{name}_plugin.py").write_text(_PLUGIN.format(name=name, ops=ops, priority=i + 1))
        info = folder / f"{name}_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[torchax.plugins]\n{name} = {name}_plugin\n")


def cold() -> Iterator[Row]:
    """Seconds and compilations until the first eager output, without the persistent cache and with a filled one."""
    for name in MODELS:
        try:
            with tempfile.TemporaryDirectory() as cache:
                without = json.loads(_run(_COLD, name, ""))
                _run(_COLD, name, cache)
                filled = json.loads(_run(_COLD, name, cache))
        except Exception as error:
            yield failed("cold", name, error)
            continue
        yield Row(
            "cold", name, without["total"], "s", f"{without['compiled']} programs, {without['seconds']:.1f} s in XLA"
        )
        yield Row(
            "cold",
            f"{name}, with the cache",
            filled["total"],
            "s",
            f"{filled['compiled']} programs, {filled['hits']} from the cache",
        )
