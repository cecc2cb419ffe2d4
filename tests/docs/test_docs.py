"""Runs every ```python block of README.md and docs/: each file in one namespace, top to bottom, in an interpreter of its own.

A block after ``<!-- no-run: reason -->`` is only parsed; a page with ``<!-- needs: package -->`` is run where the package is installed. Tracebacks point to the line in the page.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNER = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from test_docs import blocks
page = pathlib.Path(sys.argv[1])
namespace = {"__name__": "__main__"}
for block in blocks(page.read_text()):
    if block.run:
        exec(compile("\\n" * block.line + block.code, page, "exec"), namespace)
"""


@dataclasses.dataclass
class Block:
    """A fenced block of Python."""

    code: str
    line: int  # of the opening fence, counted from 1
    run: bool


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page, in order; a block inside a list is dedented."""
    found: list[Block] = []
    lines = text.splitlines()
    i, skip = 0, False
    while i < len(lines):
        if re.match(r"\s*<!-- no-run: \S.*-->\s*$", lines[i]):
            skip = True
        elif fence := re.match(r"(\s*)(`{3,}|~{3,})\s*(\w*)", lines[i]):
            indent, mark, language = fence.groups()
            end = next((j for j in range(i + 1, len(lines)) if lines[j].strip() == mark), len(lines))
            if language == "python":
                body = [line.removeprefix(indent) for line in lines[i + 1 : end]]
                found.append(Block("\n".join(body) + "\n", i + 1, not skip))
            i, skip = end, False
        elif lines[i].strip():
            skip = False
        i += 1
    return found


def test_blocks_are_found() -> None:
    page = (
        "x\n```python\na = 1\n```\n\n<!-- no-run: needs a TPU -->\n\n```python\nb = 2\n```\n"
        "- item\n  ```python\n  if a:\n      c = 3\n  ```\n```bash\nls\n```\n"
    )
    assert [(b.code, b.line, b.run) for b in blocks(page)] == [
        ("a = 1\n", 2, True),
        ("b = 2\n", 8, False),
        ("if a:\n    c = 3\n", 12, True),
    ]
    assert any(b.run for b in blocks(PAGES[0].read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_page(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = page.read_text()
    found = blocks(text)
    for block in found:
        ast.parse(block.code, filename=f"{page.name}, block at line {block.line}")
    if not any(block.run for block in found):
        return
    for package in re.findall(r"<!-- needs: (\w+) -->", text):
        pytest.importorskip(package)
    command = [sys.executable, "-c", RUNNER, str(page), str(pathlib.Path(__file__).parent)]
    result = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page: pathlib.Path) -> None:
    """Links to files of the repository lead somewhere."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
