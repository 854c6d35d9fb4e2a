"""One server for the tests that only ask it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def long_whale(fast: Kernels) -> Transformer:
    """One with a context that has room for tools."""
    return make_model(fast, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def scripted(long_whale: Transformer) -> Iterator[TestServer]:
    """A server whose ``engine.say(...)`` sets what it answers; it thinks where it is asked to."""
    tokenizer, template = make_tokenizer(), ChatTemplate(format="v3.1")
    with running(
        lambda: scripted_engine(long_whale, tokenizer),
        tokenizer=tokenizer,
        template=template,
        chats=True,
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
