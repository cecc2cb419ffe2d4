"""The HTML report in a real browser: search, filters, heat map, a phone's width, dark mode, and nothing from elsewhere."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest
from torchax_tools import cli
from typer.testing import CliRunner

BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None
)
RECORDS = [
    {"op": "nn.functional.softplus", "form": "forward", "dtype": "float32", "status": "pass"},
    {"op": "nn.functional.softplus", "form": "forward", "dtype": "bfloat16", "status": "fail", "known": "<b>why</b>"},
    {"op": "fft.fft", "form": "grad", "dtype": "complex64", "status": "pass"},
]
ACTIONS = """
const said = {};
const look = id => document.getElementById(id);
const names = () => [...document.querySelectorAll("#ops > tbody > tr > td:first-child")].map(td => td.textContent);
const type = (id, value) => { look(id).value = value; look(id).dispatchEvent(new Event("input")); };
said.all = look("count").textContent;
type("search", "softplus FORWARD_no_such");
said.none = names();
type("search", "soft plus aten");
said.found = names();
said.hash = location.hash;
type("kind", "lowered");
said.lowered = names();
look("reset").click();
type("family", "fft"); type("dtype", "complex64");
said.fft = names();
look("reset").click();
said.heat = [...document.querySelectorAll("#heat tr")].map(tr => [...tr.children].map(c => c.textContent).join("|"));
document.querySelector("#heat td button").click();
said.tapped = [look("family").value, look("dtype").value, names().length];
look("reset").click();
said.rows = names().length;
look("more").click();
said.more = names().length;
said.width = [document.documentElement.scrollWidth, innerWidth];
said.paper = getComputedStyle(document.body).backgroundColor;
said.ink = getComputedStyle(document.body).color;
said.narrow = getComputedStyle(document.querySelector("#ops > tbody > tr > td")).display;
said.errors = window.failures;
document.body.textContent = "";
document.body.append(Object.assign(document.createElement("pre"), {id: "said", textContent: JSON.stringify(said)}));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "results.json").write_text(json.dumps(RECORDS))
    file = folder / "ops.html"
    arguments = ["coverage", "--format", "html", "-o", str(file), "--results", str(folder / "results.json")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return file


def browse(page: pathlib.Path, folder: pathlib.Path, *options: str) -> dict[str, Any]:
    text = page.read_text()
    listen = "<script>window.failures = []; addEventListener('error', e => failures.push(String(e.message)));</script>"
    acted = folder / "acted.html"
    acted.write_text(
        text.replace("<head>", "<head>" + listen, 1).replace("</body>", f"<script>{ACTIONS}</script></body>")
    )
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *options]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", acted.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="said">(.*?)</pre>', result.stdout, re.S)
    assert match, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_page_needs_nothing_else(page: pathlib.Path) -> None:
    text = page.read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert text.count("</script>") == 2 and "<b>why" not in text and "@DATA@" not in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium-headless-shell")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(page: pathlib.Path, tmp_path: pathlib.Path, width: int, dark: bool) -> None:
    options = [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    said = browse(page, tmp_path, *options)
    assert said["errors"] == []
    assert re.match(r"\d{4} operators, of which \d{4} run \(\d\d\.\d %\)", said["all"])
    assert said["none"] == []
    assert "aten::softplus" in said["found"] and all("softplus" in name for name in said["found"])
    assert said["hash"] == "#search=soft+plus+aten"
    assert set(said["lowered"]) == {"aten::softplus", "aten::softplus_backward"}
    assert said["fft"] == ["aten::fft_fft"]
    assert said["heat"][0] == "|float32|bfloat16|complex64"
    assert "activation|100|0|" in said["heat"] and "fft|||100" in said["heat"]
    assert said["tapped"][:2] == ["activation", "float32"] and said["tapped"][2] >= 1
    assert said["rows"] == 200 and said["more"] == 1200
    assert said["width"][0] <= said["width"][1], "the page is wider than the window"
    assert said["narrow"] == ("block" if width < 700 else "table-cell")
    light = lambda color: sum(map(int, re.findall(r"\d+", color)[:3])) > 380
    assert light(said["paper"]) is not dark and light(said["ink"]) is dark
