"""Chromium for tests, which records page errors and requests to other machines."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

WIDTH, HEIGHT = 1280, 800
MILLISECONDS_TO_WAIT = 240_000  # the machine may be busy
# Root needs --no-sandbox. WebGL without a GPU draws MLflow's parallel coordinates and Prefect's run
# graph. The rest turns off Chromium's own requests.
OPTIONS = (
    "--no-sandbox", "--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@dataclass(frozen=True)
class Browser:
    """A running Chromium, and the violations of its pages."""

    chromium: Any
    outside: list[str] = field(default_factory=list[str])
    """Requested addresses outside this machine."""
    errors: list[str] = field(default_factory=list[str])
    """Uncaught script errors, and violations of the content security policy."""

    def open(self, url: str) -> Any:
        """Open an address in a fresh browser context."""
        page = self.chromium.new_context(viewport={"width": WIDTH, "height": HEIGHT}).new_page()
        page.set_default_timeout(MILLISECONDS_TO_WAIT)
        page.on("request", lambda request: self._note_request(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self._note_message(message.text))
        page.goto(url, wait_until="commit")
        return page

    def _note_request(self, url: str) -> None:
        if urlsplit(url).hostname not in {"127.0.0.1", "localhost", None}:
            self.outside.append(url)

    def _note_message(self, text: str) -> None:
        # Prefect's page tries to send analytics despite its settings
        if "Content Security Policy" in text and "amplitude.com" not in text:
            self.errors.append(text)


@contextmanager
def started() -> Iterator[Browser]:
    """Start the machine's Chromium, or skip the test."""
    driver = pytest.importorskip("playwright.sync_api", reason="the library playwright drives it")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on this machine")
    with driver.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield Browser(chromium)
        chromium.close()
