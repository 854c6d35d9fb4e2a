"""A browser for the tests of the chat page, and the sites that it visits.

Nothing here imports Playwright before a test asks for the browser: it may be absent.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serving.page.mock import Mock

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WATCH = """
  window.violations = [];
  document.addEventListener("securitypolicyviolation", (e) =>
    window.violations.push([e.violatedDirective, e.blockedURI, e.sourceFile].join(" ")));
"""
# These are what a test provokes; every other word in the console is a failure.
EXPECTED = ("Failed to load resource: the server responded", "Failed to load resource: net::ERR")


@dataclass
class Site:
    """A server with the page; ``mock`` is None for a real one, which says what it likes."""

    url: str
    mock: Mock | None

    def script(self) -> Mock:
        """Return the mock, which says what a test needs."""
        assert self.mock is not None, "a real server says what it likes"
        return self.mock


class Visitor:
    """A person at the page: ``page`` is Playwright's, the rest is what a person does."""

    def __init__(self, page: Any, site: Site) -> None:
        self.page = page
        self.site = site
        self.expect = pytest.importorskip("playwright.sync_api").expect
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._asked)
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(EXPECTED):
            self.complaints.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.site.url, "data:", "blob:")):
            self.strangers.append(request.url)
        if request.method == "POST" and request.post_data:
            self.bodies.append(json.loads(request.post_data))

    def open(self, fragment: str = "") -> None:
        """Open the page and wait until it knows the server."""
        self.page.goto(self.site.url + "/" + fragment)
        self.expect(self.page.locator("#model")).not_to_be_empty()

    def say(self, text: str, wait: bool = True) -> None:
        """Send a message with Enter and, unless told otherwise, wait for the whole answer."""
        self.page.locator("#input").fill(text)
        self.page.keyboard.press("Enter")
        if wait:
            self.finished()

    def finished(self) -> None:
        """Wait until nothing is being written."""
        self.page.locator(".message.assistant, .mirror .model").last.wait_for()
        self.expect(self.page.locator(".message.running")).to_have_count(0)

    def answer(self) -> Any:
        """Return the newest answer."""
        return self.page.locator(".message.assistant").last

    def text(self) -> str:
        """Return the words of the newest answer."""
        return str(self.answer().locator(".body").inner_text())


def visit(browser: Any, site: Site, **options: Any) -> Iterator[Visitor]:
    """Yield a visitor; afterwards nothing may have been refused by the policy or gone wrong."""
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}, **options})
    context.set_default_timeout(8000)
    context.add_init_script(WATCH)
    visitor = Visitor(context.new_page(), site)
    yield visitor
    violations = visitor.page.evaluate("window.violations ?? []")
    context.close()
    assert violations == []
    assert visitor.complaints == []
    assert visitor.strangers == []


def saved(folder: Path, download: Any) -> Any:
    """Return the JSON of a download."""
    path = folder / "download.json"
    download.save_as(path)
    return json.loads(path.read_text(encoding="utf-8"))
