"""A server in this process: real sockets, a real engine on a thread, a model of random weights.

``running(engine)`` gives a ``TestServer``; its ``engine`` may be spoilt in any way, and its pages
counted.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import uvicorn
import zmq
from tokenizers import Tokenizer

from tests.support import random_model, tiny_config
from ziphius.data.tokenizer import train_tokenizer
from ziphius.inference.chat import ChatTemplate
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.request import Request
from ziphius.inference.vocabulary import Vocabulary
from ziphius.kernels.select import Kernels
from ziphius.model.transformer import Transformer
from ziphius.serving.app import Application
from ziphius.serving.engine import EngineProcess, Runner
from ziphius.serving.options import EngineSettings, Limits, ServeOptions
from ziphius.serving.profiles import PROFILES
from ziphius.serving.served import Served
from ziphius.serving.server import Draining, bind, configure
from ziphius.serving.wire import Failed, Ready
from ziphius.serving.worker import Worker, describe

NAME = "whale"
VOCABULARY = 420


def make_tokenizer() -> Tokenizer:
    """Train a small tokenizer; the same one every time."""
    text = "a whale dives deep into the cold sea, and comes up again to breathe. " * 20
    return train_tokenizer([text], VOCABULARY)


def make_model(kernels: Kernels | None = None, **changes: Any) -> Transformer:
    """Return a model of random weights with that tokenizer's vocabulary."""
    config = tiny_config(**{"vocab_size": VOCABULARY, "max_position_embeddings": 512, **changes})
    return random_model(config, kernels=kernels).requires_grad_(False)


# Of a step: answers of some hundred tokens are to be under way while tests look at them.
LEAST_SECONDS = 0.003


class SlowEngine(Engine):
    """An engine of which no step is quicker than so many seconds."""

    def step(self) -> list[Request]:
        began = time.monotonic()
        touched = super().step()
        time.sleep(max(0.0, began + LEAST_SECONDS - time.monotonic()))
        return touched


def make_engine(model: Transformer, tokenizer: Tokenizer | None = None, **options: Any) -> Engine:
    """Return an engine with room for a few requests."""
    given = {"cache_tokens": 4096, "max_running": 4, "page_size": 32, **options}
    vocabulary = Vocabulary(tokenizer or make_tokenizer())
    return SlowEngine(model, vocabulary, EngineOptions(**given))


@dataclass
class ThreadRunner(Runner):
    """Runs a worker on a thread. ``make`` is called for every start, as a process is started anew.

    ``kill`` makes it stop before its next step, without a word, as a killed process would.
    """

    make: Callable[[], Engine]
    engine: Engine | None = None
    worker: Worker | None = None
    killed: threading.Event = field(default_factory=threading.Event)
    # While set, the worker stands still before its next step or beat.
    frozen: threading.Event = field(default_factory=threading.Event)
    standing: threading.Event = field(default_factory=threading.Event)  # it has come to that

    async def start(self, address: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(address,), daemon=True)
        self._thread.start()

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        self.killed.set()

    def _run(self, address: str) -> None:
        context = zmq.Context()
        line: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        line.connect(address)
        how = "its thread ended"
        try:
            self.engine = self.make()
            self.worker = _Stoppable(self.engine, line, self)
            self.worker.report(Ready(describe(self.engine), 0.0))
            self.worker.run()
        except _Killed:
            how = "its thread was killed"
        except Exception as error:
            report = Failed(f"{type(error).__name__}: {error}", 1)
            line.send(msgspec.msgpack.encode(report))
        finally:
            line.close(linger=0 if self.killed.is_set() else 1000)
            context.term()

            def tell() -> None:
                if not self._ended.done():
                    self._ended.set_result(how)

            self._loop.call_soon_threadsafe(tell)


class _Killed(BaseException):
    """The thread is to end as a killed process does."""


class _Stoppable(Worker):
    """A worker that a test can freeze and kill."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], runner: ThreadRunner) -> None:
        super().__init__(engine, socket)
        self._runner = runner

    def _listen(self) -> None:
        while self._runner.frozen.is_set() and not self._runner.killed.is_set():
            self._runner.standing.set()
            time.sleep(0.01)
        self._runner.standing.clear()
        if self._runner.killed.is_set():
            raise _Killed
        super()._listen()


@dataclass
class TestServer:
    """A server that answers at ``url``."""

    __test__ = False

    url: str
    application: Application
    runners: list[ThreadRunner]
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def runner(self) -> ThreadRunner:
        """The runner of the present engine."""
        return self.runners[-1]

    @property
    def engine(self) -> Engine:
        """The present engine."""
        assert self.runner.engine is not None
        return self.runner.engine

    def client(self, **options: Any) -> httpx.Client:
        """Return a client of this server."""
        return httpx.Client(base_url=self.url, **{"timeout": 30, **options})

    def until(self, true: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait until something is so. Raises AssertionError when it does not become so."""
        ends = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < ends, f"still not so after {seconds} s"
            time.sleep(0.01)

    def until_idle(self, seconds: float = 20.0) -> None:
        """Wait until no request is left anywhere, and no page is held."""
        link = self.application.engine.link
        assert link is not None
        self.until(lambda: self.engine.idle and link.open == 0, seconds)
        assert self.engine.pool.used == 0
        assert link.waiting_tokens == 0


@contextmanager
def running(
    make: Callable[[], Engine],
    *,
    tokenizer: Tokenizer | None = None,
    template: ChatTemplate | None = None,
    limits: Limits | None = None,
    profile: str = "none",
    chats: bool = False,
    spoil: Callable[[Application], None] = lambda application: None,
    on_ready: Callable[[Application], None] = lambda application: None,
    kernel_bytes: int = 0,
    **options: Any,
) -> Iterator[TestServer]:
    """Serve the engines that ``make`` makes, until the block ends.

    ``kernel_bytes`` bounds what the system holds of a connection's unread answer.
    """
    runners: list[ThreadRunner] = []

    def runner() -> ThreadRunner:
        runners.append(ThreadRunner(make))
        return runners[-1]

    given = ServeOptions(
        model_name=NAME,
        engine=EngineSettings(checkpoint="none"),
        limits=limits or Limits(drain_seconds=2.0),
        profile=profile,
        **options,
    )
    served = Served(
        NAME,
        tokenizer or make_tokenizer(),
        template or ChatTemplate(),
        bos=0,
        profile=PROFILES[profile],
        format_told=chats,
    )
    ready = threading.Event()
    made: list[Any] = []
    listening = bind("127.0.0.1", 0)
    if kernel_bytes:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kernel_bytes)

    def run() -> None:
        # Sockets of zmq belong to a loop: everything is made on the server's own thread.
        engine = EngineProcess(runner, given.limits)
        application = Application(given, served, engine)
        spoil(application)

        def tell(application: Application) -> None:
            ready.set()
            on_ready(application)

        server = Draining(configure(application), application, tell)
        made.extend((application, server))
        server.run(sockets=[listening])

    thread = threading.Thread(target=run, name="test-server", daemon=True)
    thread.start()
    assert ready.wait(30), "the server did not start"
    application, server = made
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        yield TestServer(url, application, runners, server, thread)
    finally:
        for one in runners:
            one.frozen.clear()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
