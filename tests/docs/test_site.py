"""The documentation site: it builds without a warning, needs no network, and answers needs."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from foveate.core.catalog import public_names, systems
from foveate.core.cite import cite
from foveate.core.public import PACKAGES
from tests.support.readme import ROOT

#: What people type into the site's search, and a system that has to be among the first four pages.
NEEDS = {
    "long context without retraining": "token_select",
    "smaller KV cache": "razor_attention",
    "faster decoding": "tidal_decode",
    "time to first token": "hip",
    "images in linear time": "inline_attention",
    "unordered sets": "set_transformer",
    "interpretability": "dependency_vit",
    "machine translation": "luong_attention",
    "mixture of experts": "moh",
    "streaming": "sliding_window",
    "camera poses": "gta",
    "attention sinks": "act_calibration",
    "hedgehog": "hedgehog",
}


def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_check", ROOT / "docs" / "site" / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip('the site needs the docs extra: pip install -c constraints.txt -e ".[docs]"')
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(built)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return built


def text(site: Path, page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", (site / page).read_text("utf-8")))


@pytest.mark.slow
def test_links_lead_somewhere_and_nothing_is_loaded_from_a_network(site: Path) -> None:
    assert checker().faults(site) == []


@pytest.mark.slow
def test_every_public_name_is_described(site: Path) -> None:
    for package in PACKAGES:
        page = (site / "api" / f"{package}.html").read_text("utf-8")
        missing = [name for name, module in public_names(package).items() if f'id="{module}.{name}"' not in page]
        assert not missing, package


@pytest.mark.slow
def test_every_system_has_its_page(site: Path) -> None:
    ledger = (ROOT / "docs" / "claims.md").read_text("utf-8")
    for row in systems():
        page = text(site, f"system/{row.key}.html")
        assert row.title in page
        assert cite(row.key).splitlines()[0] in page
        claims = re.findall(rf"^\| \[?{row.key}\]?(?:\([^|]*\))? \| ([^|]*) \|", ledger, re.MULTILINE)
        for claim in claims:
            assert re.sub(r"\W+", "", claim) in re.sub(r"\W+", "", page), row.key


@pytest.mark.slow
def test_the_guides_are_there(site: Path) -> None:
    for page in (
        "index",
        "architecture",
        "choose",
        "contributing",
        "claims",
        "real",
        "notebooks/compress",
        "changelog",
    ):
        assert (site / f"{page}.html").is_file(), page
    assert "A tensor through" in text(site, "architecture.html")


@pytest.mark.slow
def test_its_search_answers_needs(site: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("the site's search runs in JavaScript, and there is no node here")
    command = [node, str(Path(__file__).with_name("search.js")), str(site), *NEEDS]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    late = {need: found[need][:4] for need, key in NEEDS.items() if f"system/{key}.html" not in found[need][:4]}
    assert not late


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', "loads //fonts.example/a.css"),
        ('<img src="gone.png">', "loads gone.png, which is not there"),
        ('<a href="gone.html">x</a>', "links to gone.html, which is not there"),
        ('<a href="other.html#nowhere">x</a>', "links to other.html#nowhere, and there is no such place"),
        ('<a href="#nowhere">x</a>', "links to #nowhere, and there is no such place"),
        ('<pre class="mermaid">graph</pre>', "a mermaid diagram"),
    ],
)
def test_the_check_notices(tmp_path: Path, page: str, fault: str) -> None:
    (tmp_path / "other.html").write_text('<h1 id="here">Here</h1>', "utf-8")
    (tmp_path / "page.html").write_text(page, "utf-8")
    (found,) = checker().faults(tmp_path)
    assert found.startswith(f"page.html: {fault}")


def test_the_check_passes_what_is_well(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text('<h1 id="here">Here</h1>', "utf-8")
    (tmp_path / "style.css").write_text("@font-face { src: url(font.woff) }", "utf-8")
    page = '<link rel="stylesheet" href="style.css"><a href="folder/#here">x</a><a href="https://arxiv.org/abs/1">y</a>'
    (tmp_path / "page.html").write_text(page, "utf-8")
    assert checker().faults(tmp_path) == []
    (tmp_path / "style.css").write_text("@import url('https://fonts.example/a.css')", "utf-8")
    assert checker().faults(tmp_path) == ["style.css: loads https://fonts.example/a.css"]
