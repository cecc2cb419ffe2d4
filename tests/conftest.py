"""What all tests share: the environment that JAX is started in, hypothesis profiles, and fixtures.

The environment is set here, before anything imports jax; programs that tests start in a subprocess inherit it.
"""

from __future__ import annotations

import jax_environment

jax_environment.prepare()

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jax
import jax.monitoring
import pytest
import torch
import torchax

hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    max_examples=25,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("ci"), max_examples=500, derandomize=False
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# Results of OpInfo cases ------------------------------------------------------------------------------------------

_OPINFO: list[dict[str, Any]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Gather what tests recorded as ``opinfo``; reports of xdist's workers come here, too."""
    if report.when == "call":
        _OPINFO.extend(r for name, records in report.user_properties if name == "opinfo" for r in records)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the gathered results; TORCHAX_OPINFO_RESULTS names the file."""
    if _OPINFO and not hasattr(session.config, "workerinput"):
        default = jax_environment.ROOT / ".cache" / "opinfo-results.json"
        path = pathlib.Path(os.environ.get("TORCHAX_OPINFO_RESULTS", default))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_OPINFO, indent=0))


# Randomness -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, on both sides."""
    torch.manual_seed(0)


# Compilations -----------------------------------------------------------------------------------------------------


class CompileCounter:
    """Counts programs that XLA was asked for while a test runs (programs out of the persistent cache included)."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def expect(self, n: int) -> Iterator[None]:
        """The block compiles exactly `n` programs."""
        before = self.count
        yield
        assert self.count - before == n, f"{self.count - before} programs were compiled, expected {n}"


_COUNTERS: list[CompileCounter] = []


def _on_event(event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for counter in _COUNTERS:
            counter.count += 1


jax.monitoring.register_event_duration_secs_listener(_on_event)


@pytest.fixture
def compile_counter() -> Iterator[CompileCounter]:
    """A `CompileCounter` that listens until the test ends; fails if jax no longer reports compilations."""
    counter = CompileCounter()
    _COUNTERS.append(counter)
    try:
        jax.jit(lambda a: a * 3)(1.0)  # a new function: not in the in-process cache
        assert counter.count, "jax reports no compilation: the counter would be worthless"
        counter.reset()
        yield counter
    finally:
        _COUNTERS.remove(counter)


# Pairs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``pair(2, 3, dtype=..., requires_grad=...)``: the same random values as a CPU tensor and on device jax.

    A tensor given instead of sizes is paired with its copy on jax.
    """

    def make(
        *shape: Any, dtype: torch.dtype = torch.float32, requires_grad: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(shape) == 1 and isinstance(shape[0], torch.Tensor):
            cpu = shape[0].detach()
        elif dtype == torch.bool:
            cpu = torch.rand(shape) > 0.5
        elif dtype.is_floating_point or dtype.is_complex:
            cpu = torch.randn(shape, dtype=dtype)
        else:
            cpu = torch.randint(0 if dtype == torch.uint8 else -9, 10, shape, dtype=dtype)
        other = cpu.to("jax")
        return cpu.requires_grad_(requires_grad), other.requires_grad_(requires_grad)

    return make


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """``assert_same(jax_result, cpu_result)``: see `helpers.assert_same`."""
    from helpers import assert_same

    return assert_same


@pytest.fixture
def config() -> Iterator[Any]:
    """`torchax.config`, put back as it was when the test ends."""
    before = {name: option.value for name, option in torchax.config.options().items()}
    yield torchax.config
    for name, value in before.items():
        if getattr(torchax.config, name) is not value:
            setattr(torchax.config, name, value)


@pytest.fixture
def full_effort() -> Iterator[None]:
    """XLA optimises as it does for users, not as `jax_environment` tells it to: for what the compiler fuses, and for its figures."""
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


@pytest.fixture
def jax_devices() -> list[jax.Device]:
    """The virtual devices of the test process, at least two."""
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs several JAX devices; XLA_FLAGS was set from outside")
    return devices
