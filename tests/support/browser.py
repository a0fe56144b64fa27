"""Pages in headless Chromium: the browser, and one visit to a page, with its requests and console messages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SIZES = pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        message = "no Chromium on this machine (Debian: apt-get install chromium)"
        if "CI" in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield running
        running.close()


class Visit:
    """A page opened from disk."""

    def __init__(self, browser: Any, page: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.address = page.as_uri()
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.address)

    def check(self) -> None:
        """Check that nothing was said on the console, and nothing requested but the page."""
        assert self.complaints == [] and self.requests == [self.address]

    def __call__(self, script: str) -> Any:
        return self.page.evaluate(script)

    def text(self, name: str) -> str:
        return self.page.locator(name).inner_text()

    def wait(self, script: str) -> None:
        """Wait until `script` is true; Playwright's own waiting evaluates strings in the page, which the policy
        forbids."""
        for _ in range(400):
            if self(script):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"never true: {script}; {self.complaints}")


def visits(open_page: Callable[..., Visit]) -> Iterator[Callable[..., Visit]]:
    """Yield `open_page`, and close the pages that it opened; the body of a fixture `visit`."""
    opened: list[Visit] = []

    def opening(*args: Any, **options: Any) -> Visit:
        opened.append(open_page(*args, **options))
        return opened[-1]

    yield opening
    for one in opened:
        one.page.close()
