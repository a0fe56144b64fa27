"""Check a built site: `python docs/site/check.py build/site`. It loads nothing from a network, and all links lead on.

Pages may link to papers; what a page loads (scripts, styles, fonts, pictures) has to lie beside it.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
_STYLES = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""")


class Contents(HTMLParser):
    """Return what a page loads, what it links to, and the places in it that a link can name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.diagrams = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        self.diagrams += "mermaid" in given.get("class", "").split()
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.loads.append(given.get("href", ""))
        elif tag in _LOADED and given.get(_LOADED[tag]):
            self.loads.append(given[_LOADED[tag]])
        elif tag in ("a", "link") and given.get("href"):
            self.links.append(given["href"])


def faults(site: Path) -> list[str]:
    """Return all faults, one line each."""
    pages = {path: Contents(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        if page.diagrams:
            found.append(f"{where}: a mermaid diagram, whose script comes from the network")
        for address in page.loads:
            if _is_remote(address):
                found.append(f"{where}: loads {address}")
            elif not address.startswith("data:") and not _target(site, path, address).is_file():
                found.append(f"{where}: loads {address}, which is not there")
        for address in page.links:
            found += [f"{where}: {fault}" for fault in _broken(site, path, address, pages)]
    for style in site.rglob("*.css"):
        found += [
            f"{style.relative_to(site)}: loads {address}" for address in _STYLES.findall(style.read_text("utf-8"))
        ]
    return found


def _is_remote(address: str) -> bool:
    return urlsplit(address).scheme in ("http", "https") or address.startswith("//")


def _target(site: Path, page: Path, address: str) -> Path:
    """Return the file that an address of a page names."""
    path = unquote(urlsplit(address).path)
    if not path:
        return page
    file = (site / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve()
    return file / "index.html" if file.is_dir() else file


def _broken(site: Path, page: Path, address: str, pages: dict[Path, Contents]) -> list[str]:
    if _is_remote(address) or urlsplit(address).scheme in ("mailto", "data", "javascript"):
        return []
    target, place = _target(site, page, address), unquote(urlsplit(address).fragment)
    if not target.is_file():
        return [f"links to {address}, which is not there"]
    inside = pages.get(target)
    if place and inside is not None and place not in inside.places and not place.startswith("__"):
        return [f"links to {address}, and there is no such place on that page"]
    return []


if __name__ == "__main__":
    built = Path(sys.argv[1]).resolve()
    wrong = faults(built)
    count = sum(1 for _ in built.rglob("*.html"))
    print("\n".join([*wrong, f"{count} pages, {len(wrong)} faults"]))
    sys.exit(bool(wrong) or count == 0)
