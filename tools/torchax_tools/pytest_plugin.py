"""Options, a marker and fixtures for pytest, in projects that test with torchax. Loaded through entry point ``torchax``.

``--torchax-platform cpu|gpu|tpu`` runs the tests on that platform: it is told to JAX before anything imports it, and
the run ends with an error where the platform is not there. Without it, JAX chooses, and nothing is imported.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # to the name that JAX_PLATFORMS takes


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--torchax-platform``."""
    parser.getgroup("torchax").addoption(
        "--torchax-platform",
        choices=list(PLATFORMS),
        default=None,
        help="the platform on which device 'jax' computes; default: JAX's own choice",
    )


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Tell JAX the platform, before a conftest can import it."""
    wanted = early_config.known_args_namespace.torchax_platform
    if wanted is None:
        return
    os.environ["JAX_PLATFORMS"] = PLATFORMS[wanted]  # for programs that tests start, too
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", PLATFORMS[wanted])


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and see that the platform is there."""
    config.addinivalue_line(
        "markers",
        "torchax_platforms(*names): the test needs one of these platforms (cpu, gpu, tpu); else it is skipped",
    )
    wanted = config.getoption("torchax_platform")
    if wanted is None:
        return
    try:
        found = _platform()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [f"it finds none ({type(error).__name__})"])[0]
        remedy = {"gpu": "pip install 'torchax[cuda]'", "tpu": "pip install 'torchax[tpu]'"}.get(
            wanted, "unset JAX_PLATFORMS"
        )
        raise pytest.UsageError(
            f"--torchax-platform {wanted}: JAX cannot use it here: {reason}. Where there is one, {remedy}"
        ) from None
    if found != wanted:
        raise pytest.UsageError(
            f"--torchax-platform {wanted}: JAX computes on {found}, since its devices were made before the option was read; "
            "set JAX_PLATFORMS instead"
        )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say the platform and the plugins, if the option is given."""
    if config.getoption("torchax_platform") is None:
        return None
    from torchax import plugins

    states = ", ".join(f"{s.name} {s.info.get('version', '')} {s.state}" for s in plugins.status())
    return f"torchax: platform {_platform()}, plugins: {states or 'none'}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that are for other platforms."""
    names = [name for mark in item.iter_markers("torchax_platforms") for name in mark.args]
    if unknown := set(names) - set(PLATFORMS):
        raise pytest.UsageError(f"no platform {', '.join(sorted(unknown))}; there are {', '.join(PLATFORMS)}")
    if names and _platform() not in names:
        pytest.skip(f"needs platform {' or '.join(names)}; this is {_platform()}")


@pytest.fixture(scope="session")
def torchax_platform() -> str:
    """The platform on which device ``"jax"`` computes: ``cpu``, ``gpu`` or ``tpu``."""
    return _platform()


def _platform() -> Any:
    import jax

    return jax.default_backend()
