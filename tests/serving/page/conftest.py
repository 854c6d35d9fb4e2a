"""The browser, the servers and the visitors of the chat page's tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.page.browser import ARGUMENTS, CHROMIUM, Site, Visitor, visit
from tests.serving.page.mock import Mock, served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless.

    For a module, not longer: while Playwright runs, this thread has a running event loop, and other
    tests could not start one.
    """
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt install chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """A chat model's server."""
    mock = Mock()
    with served(mock) as url:
        yield Site(url, mock)


@pytest.fixture
def base_site() -> Iterator[Site]:
    """The server of a model that only goes on with a text."""
    mock = Mock(chat=False, thinking="never", tools=False)
    with served(mock) as url:
        yield Site(url, mock)


@pytest.fixture
def visitor(browser: Any, site: Site) -> Iterator[Visitor]:
    """A person with a desktop and the page open."""
    for one in visit(browser, site):
        one.open()
        yield one


@pytest.fixture
def reader(browser: Any, base_site: Site) -> Iterator[Visitor]:
    """A person at the page of a model that cannot chat."""
    for one in visit(browser, base_site):
        one.open()
        yield one


@pytest.fixture(scope="module")
def shared(browser: Any) -> Iterator[Visitor]:
    """A page whose modules are called directly; the tests of one file share it."""
    mock = Mock()
    with served(mock) as url:
        for one in visit(browser, Site(url, mock)):
            one.open()
            yield one


@pytest.fixture
def phone(browser: Any, site: Site) -> Iterator[Visitor]:
    """A person with a small phone."""
    for one in visit(
        browser,
        site,
        viewport={"width": 360, "height": 640},
        has_touch=True,
        is_mobile=True,
        reduced_motion="reduce",
    ):
        one.open()
        yield one
