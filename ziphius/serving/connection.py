"""A client's connection: uvicorn's, with bounds where uvicorn has none.

Uvicorn waits for ever for a request's head, however long, and for a client to take what was written
to it; here neither outlasts its limit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ziphius.serving.errors import ApiError, encode
from ziphius.serving.gate import ACCESS, new_request_id, request_id
from ziphius.serving.options import Limits

LOG = logging.getLogger("ziphius.serving")
# Where uvicorn warns of what clients do wrong, of which our own log has a line.
UVICORN = logging.getLogger("uvicorn.error.connection")

# A body in chunks of a byte is framed by five: more than this many to a byte is no body.
_FRAMING = 16
# How long a client may go on sending a body that was refused; it reads our answer after that.
_LINGER_SECONDS = 5.0
_PHRASES = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class Connection(HttpToolsProtocol):
    """One connection of uvicorn's server; its requests come one after another.

    ``on_refused`` is told the status of an answer to what never was a request.
    """

    def __init__(
        self,
        *given: Any,
        limits: Limits,
        on_refused: Callable[[int], None] = lambda status: None,
        **named: Any,
    ) -> None:
        super().__init__(*given, **named)
        self.logger = UVICORN
        self._limits, self._on_refused = limits, on_refused
        # Between a message's end and the end of the next one's head.
        self._in_head = True
        self._overhead = 0  # bytes of this message, less what its body accounts for
        self._refusal: ApiError | None = None
        self._answered: RequestResponseCycle | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}

    # --- what comes -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection."""
        super().connection_made(transport)
        self._later("head", self._limits.head_seconds, self._head_is_late)

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        if self._in_head and "head" not in self._timers:
            self._later("head", self._limits.head_seconds, self._head_is_late)
        self._overhead += len(data)
        super().data_received(data)
        if self._overhead > self._limits.max_head_bytes and not self.transport.is_closing():
            self._refuse(self._too_large())

    def on_headers_complete(self) -> None:
        """Take a request's head. What is raised here ends the connection with a 400."""
        self._stop("head")
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_head_bytes:
            self._refusal = self._too_large()
            raise self._refusal
        super().on_headers_complete()
        self._in_head = False  # a head that is no good belongs to no request

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._overhead -= _FRAMING * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the next byte belongs to another request."""
        self._in_head, self._overhead = True, 0
        self._stop("linger")
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that is answered; uvicorn tells the newest, which may wait behind it."""
        for name in list(self._timers):
            self._stop(name)
        self._unset_keepalive_if_required()
        cycle = self._answered
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    # --- what is refused --------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or what was raised while it was read."""
        bad = ApiError(400, "this is not HTTP/1.1 as this server reads it", code="invalid_http")
        self._refuse(self._refusal or bad)

    def _too_large(self) -> ApiError:
        most = self._limits.max_head_bytes
        return ApiError(431, f"the head has more than {most} bytes", code="headers_too_large")

    def _head_is_late(self) -> None:
        if self.headers is None or not self._overhead:  # nothing was asked
            self.transport.close()
        else:
            self._refuse(ApiError(408, "the head did not arrive in time", code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, unless another answer is on its way, and close."""
        cycle = self._answered
        own = cycle is self.cycle and not self._in_head  # the error is in this request's body
        if cycle is None or cycle.response_complete or (own and not cycle.response_started):
            body = encode(error.body)
            if cycle is None or cycle.response_complete:
                known = self._note(error)
            else:
                known = _refused_in(cycle, error)
            head = (
                f"HTTP/1.1 {error.status} {_PHRASES[error.status]}\r\n"
                f"content-type: application/json\r\nx-request-id: {known}\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self._close()

    def _note(self, error: ApiError) -> str:
        """Log and count what never came to be a request; return the id for it."""
        fields = {
            "request_id": new_request_id(), "method": "-", "path": "-", "status": error.status,
            "error": str(error),
        }  # fmt: skip
        ACCESS.info("request", extra={"fields": fields})
        self._on_refused(error.status)
        return str(fields["request_id"])

    # --- what is not taken ------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Note that the client takes less than it is given."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """Note that there is room again."""
        self._stop("write")
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Go on with the next request; pass over what is left of this one's body."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif not self._in_head and self.cycle.response_complete:
            self._later("linger", _LINGER_SECONDS, self._close)

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that nobody uses."""
        self._close()

    def _close(self) -> None:
        """Close once all is written, or when that does not go on."""
        self.transport.close()
        if self.transport.get_write_buffer_size() and "write" not in self._timers:
            self._watch_writing()

    def _watch_writing(self) -> None:
        left = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < left:
                self._watch_writing()
            else:
                LOG.info("a client takes nothing of its answer: its connection is closed")
                self.transport.abort()

        self._later("write", self._limits.write_seconds, look)

    # --- time -------------------------------------------------------------------------------------

    def _later(self, name: str, seconds: float, act: Any) -> None:
        """Act after a while, in place of what was to be done under this name."""
        self._stop(name)

        def run() -> None:
            self._timers.pop(name, None)
            act()

        self._timers[name] = self.loop.call_later(seconds, run)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


def _refused_in(cycle: RequestResponseCycle, error: ApiError) -> str:
    """Tell the gate, which logs this request, what it was answered; return its id."""
    scope: Any = cycle.scope
    scope["refused"] = error
    found: str = scope.setdefault("request_id", request_id(scope))  # it may not have begun
    return found
