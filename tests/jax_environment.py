"""The environment that Python and JAX are started in for tests and for the tools beside them; imports neither jax nor torch."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 4


# tests compile thousands of tiny programs and run each a few times
_QUICK = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
# twice as quick again, by flags that come and go: XLA ends the process over one that it does not know
_QUICKER = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
_KNOWN = "0.10."


def prepare() -> None:
    """Set what is not set from outside. To be called before jax is imported; subprocesses inherit it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "").split()
    wanted = [f"--xla_force_host_platform_device_count={DEVICES}", *_QUICK]
    if importlib.metadata.version("jaxlib").startswith(_KNOWN):
        wanted += _QUICKER
    for flag in wanted:
        if not any(f.split("=")[0] == flag.split("=")[0] for f in flags):
            flags.append(flag)
    os.environ["XLA_FLAGS"] = " ".join(flags)
    # programs for TPU are compiled and never run; where the compiler's own choices are tested: `full_effort` of conftest.py
    os.environ.setdefault("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # a hundred subprocesses would each compile torch and jax
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".cache" / "bytecode"))
        sys.pycache_prefix, sys.dont_write_bytecode = os.environ["PYTHONPYCACHEPREFIX"], False
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MPLBACKEND", "agg")
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
