"""One server for the tests that only ask it; the browser and the visitors of the chat page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.page_browser import ARGUMENTS, CHROMIUM, Site, Visitor, visit
from tests.serving.page_mock import Mock, served
from tests.serving.programs import write_checkpoint
from tests.serving.scripted import scripted_engine
from tests.serving.support import TestServer, make_engine, make_model, make_tokenizer, running
from ziphius.inference.chat import ChatTemplate
from ziphius.kernels.select import Kernels, answering_kernels
from ziphius.model.transformer import Transformer


@pytest.fixture(scope="session")
def fast(kernel_folder: Path) -> Kernels:
    """The compiled kernels."""
    return answering_kernels(kernel_folder)


@pytest.fixture(scope="session")
def whale(fast: Kernels) -> Transformer:
    """A model of random weights; nobody changes it."""
    return make_model(fast)


@pytest.fixture(scope="module")
def server(whale: Transformer) -> Iterator[TestServer]:
    """A server that a module's tests share; each leaves it as it was."""
    tokenizer = make_tokenizer()
    with running(lambda: make_engine(whale, tokenizer), tokenizer=tokenizer) as started:
        yield started
        started.until_idle()


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


@pytest.fixture(scope="session")
def long_whale(fast: Kernels) -> Transformer:
    """One with a context that has room for tools."""
    return make_model(fast, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def scripted(long_whale: Transformer) -> Iterator[TestServer]:
    """A server whose ``engine.say(...)`` sets what it answers; it thinks where it is asked to."""
    tokenizer, template = make_tokenizer(), ChatTemplate(format="v3.1")
    with running(
        lambda: scripted_engine(long_whale, tokenizer), tokenizer=tokenizer, template=template
    ) as started:
        started.until(lambda: started.application.engine.state == "ready")
        yield started
        started.until_idle()


@pytest.fixture(scope="session")
def home(kernel_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's home whose cache has the compiled kernels."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "ziphius").symlink_to(kernel_folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "whale")
