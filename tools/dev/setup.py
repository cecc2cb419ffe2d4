"""Make the virtual environment `.venv` and install the five distributions from this checkout into it.

usage: python3 tools/dev/setup.py [EXTRA ...]      e.g. `python3 tools/dev/setup.py test`

Needs Python 3.11 or newer and nothing else. A second run does nothing unless a pyproject.toml changed or an extra was
not there yet. The sources are installed editable: what you change is what runs.
"""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"
PACKAGES = ("torchax-core", "torchax-ops-aten", "torchax-ops-pallas", "torchax-interop")


def fingerprint() -> str:
    """A digest of everything that decides what is installed."""
    digest = hashlib.sha256(TORCH.encode() + sys.version.encode())
    for file in [ROOT / "pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def main(extras: set[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  the program that runs before pip can look at requires-python
        print(
            f"torchax needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable})", file=sys.stderr
        )
        return 2
    place = ROOT / ".venv"
    stamp = place / "torchax-setup.txt"
    known = stamp.read_text().split() if stamp.exists() else [""]
    if known[0] == fingerprint() and extras <= set(known[1:]):
        return 0
    extras |= set(known[1:])
    start = time.monotonic()
    python = place / "bin" / "python"
    if not python.exists():
        print(f"making {place}", flush=True)
        venv.create(place, with_pip=True)
    wanted = f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT)
    editable = [part for name in PACKAGES for part in ("-e", str(ROOT / "packages" / name))]
    print(
        f"installing {TORCH}, the five distributions and extras {sorted(extras)}: this takes a few minutes", flush=True
    )
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--no-compile",
        TORCH,
        *editable,
        "-e",
        wanted,
    ]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        print(f"the installation failed: {' '.join(command)}", file=sys.stderr)
        return code
    stamp.write_text(" ".join([fingerprint(), *sorted(extras)]) + "\n")
    print(f"ready after {time.monotonic() - start:.0f} s: {place}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(set(sys.argv[1:])))
