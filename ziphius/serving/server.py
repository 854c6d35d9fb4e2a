"""Listening, and ending in good order."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.serving.app import Application
from ziphius.serving.engine import EngineProcess, Subprocess
from ziphius.serving.options import ServeOptions
from ziphius.serving.served import Served
from ziphius.serving.tracing import Tracing

log = logging.getLogger("ziphius.serving")

_BACKLOG = 2048
# Of the time to drain, what is left for telling clients that it is over.
_LAST_WORDS_SECONDS = 2.0


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises BadInput for an address that can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        hint = "another program has it: choose another --port" if taken else str(error)
        raise BadInput(f"{host} port {port}: cannot listen there: {hint}") from None
    listening.listen(_BACKLOG)
    listening.setblocking(False)
    return listening


def serve(
    options: ServeOptions,
    listening: socket.socket,
    *,
    tls: tuple[str, str] | None = None,
    on_ready: Callable[[Application], None] = lambda application: None,
) -> None:
    """Serve until a signal comes. ``tls`` are the files of a certificate and its key.

    SIGTERM and Ctrl-C let what runs end within the time to drain; a second one does not wait.
    Raises ZiphiusError where the engine can't be had.
    """
    served = Served.read(options)
    engine = EngineProcess(partial(Subprocess, options.engine), options.limits)
    tracing = Tracing.to(options.otlp_endpoint) if options.otlp_endpoint is not None else None
    application = Application(options, served, engine, tracing)
    config = uvicorn.Config(
        application.asgi,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(options.limits.drain_seconds + _LAST_WORDS_SECONDS) + 1,
        ssl_certfile=tls[0] if tls else None,
        ssl_keyfile=tls[1] if tls else None,
    )
    server = Draining(config, application, on_ready)
    server.run(sockets=[listening])
    if engine.fatal is not None:
        failure = BadInput if engine.exit_code == 2 else ZiphiusError
        raise failure(engine.fatal)


class Draining(uvicorn.Server):
    """Uvicorn's server, whose end lets what runs end, and tells the rest that it is over."""

    def __init__(
        self,
        config: uvicorn.Config,
        application: Application,
        on_ready: Callable[[Application], None],
    ) -> None:
        super().__init__(config)
        self._application, self._on_ready = application, on_ready
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and to watch the engine."""
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch_engine(), name="watch-engine")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and let what runs end."""
        self._application.gate.draining = True
        ending = asyncio.create_task(self._tell_the_rest(), name="drain")
        await super().shutdown(sockets)
        ending.cancel()
        self._watching.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; the second one ends everything at once."""
        if not self.should_exit:
            name, open_now = signal.Signals(sig).name, self._application.gate.open
            log.info("%s: %d requests may end; once more stops at once", name, open_now)
        else:
            self._application.engine.end_all("the server was stopped")
        super().handle_exit(sig, frame)

    async def _tell_the_rest(self) -> None:
        await asyncio.sleep(self._application.options.limits.drain_seconds)
        self._application.engine.end_all("the server is shutting down: it took too long to end")

    async def _watch_engine(self) -> None:
        """Tell when the engine is ready, and stop where there will be none."""
        engine, told = self._application.engine, False
        while not self.should_exit:
            if engine.fatal is not None:
                self.should_exit = True
            elif not told and engine.state == "ready":
                told = True
                self._on_ready(self._application)
            await asyncio.sleep(0.05 if not told else 0.5)
