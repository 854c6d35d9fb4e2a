"""Listening, and ending in good order."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.serving.app import Application
from ziphius.serving.connection import UVICORN, Connection
from ziphius.serving.engine import EngineProcess, Subprocess
from ziphius.serving.options import ServeOptions
from ziphius.serving.served import Served
from ziphius.serving.tracing import Tracing

LOG = logging.getLogger("ziphius.serving")

_BACKLOG = 2048
# Of the time to drain, what is left for telling clients that it is over.
_LAST_WORDS_SECONDS = 2.0
_LOOK_SECONDS = 0.1


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
    Raises ZiphiusError where the engine can't be had, and BadInput for what can't be served.
    """
    if tls is not None:
        check_certificate(*tls)
    served = Served.read(options)
    engine = EngineProcess(partial(Subprocess, options.engine), options.limits)
    tracing = Tracing.to(options.otlp_endpoint) if options.otlp_endpoint is not None else None
    application = Application(options, served, engine, tracing)
    server = Draining(configure(application, tls), application, on_ready)
    server.run(sockets=[listening])
    if engine.fatal is not None:
        failure = BadInput if engine.exit_code == 2 else ZiphiusError
        raise failure(engine.fatal)


def check_certificate(certificate: str, key: str) -> None:
    """Raise BadInput for files that are no certificate with its key."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # an SSLError is one
        raise BadInput(
            f"--tls-cert {certificate} with --tls-key {key}: cannot be used: {error}"
        ) from None


def configure(application: Application, tls: tuple[str, str] | None = None) -> uvicorn.Config:
    """Return uvicorn's settings: our own connections, no WebSockets, no logs beside ours."""
    limits = application.options.limits
    refused = partial(application.metrics.answered, "none")
    UVICORN.setLevel(logging.ERROR)
    return uvicorn.Config(
        application.asgi,
        loop="uvloop",
        http=partial(Connection, limits=limits, on_refused=refused),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(limits.drain_seconds + _LAST_WORDS_SECONDS) + 1,
        ssl_certfile=tls[0] if tls else None,
        ssl_keyfile=tls[1] if tls else None,
    )


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
        self._at_once = False

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
        """Note a signal; the second one ends everything at once.

        Uvicorn would send itself the signal again at the end: ended in good order, ours exits 0.
        """
        if not self.should_exit:
            name, open_now = signal.Signals(sig).name, self._application.gate.open
            LOG.info("%s: %d requests may end; once more stops at once", name, open_now)
        else:
            self._at_once = True
        self.should_exit = True

    async def _tell_the_rest(self) -> None:
        """End what runs when the time is up, or at the second signal."""
        engine, seconds = self._application.engine, self._application.options.limits.drain_seconds
        ends = time.monotonic() + seconds
        while not self._at_once and time.monotonic() < ends:
            await asyncio.sleep(min(_LOOK_SECONDS, seconds))
        if not self._at_once:
            engine.end_all("the server is shutting down: the answer took too long to end")
        while not self._at_once:
            await asyncio.sleep(_LOOK_SECONDS)
        engine.end_all("the server was stopped")
        await asyncio.sleep(_LOOK_SECONDS)  # the clients' last words
        self.force_exit = True

    async def _watch_engine(self) -> None:
        """Tell when the engine is ready, and stop where there will be none."""
        engine, told = self._application.engine, False
        while not self.should_exit:
            if engine.fatal is not None:
                self.should_exit = True
            elif not told and engine.state == "ready":
                told = True
                self._tell_ready()
            await asyncio.sleep(0.05 if not told else 0.5)

    def _tell_ready(self) -> None:
        """Tell the operator. What fails there is no reason to look after the engine no more."""
        try:
            self._on_ready(self._application)
        except Exception:
            LOG.exception("that the engine is ready could not be told")
