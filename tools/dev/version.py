"""Set the version of all five distributions, and of the requirements between them.

usage: python tools/dev/version.py 0.2.0
"""

from __future__ import annotations

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", arguments[0]):
        print(__doc__, file=sys.stderr)
        return 2
    for file in [ROOT / "pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]:
        text = file.read_text()
        text = re.sub(r'^version = ".*"$', f'version = "{arguments[0]}"', text, count=1, flags=re.M)
        text = re.sub(r'"(torchax-[a-z-]+)==[^"]*"', rf'"\1=={arguments[0]}"', text)
        file.write_text(text)
        print(file.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
