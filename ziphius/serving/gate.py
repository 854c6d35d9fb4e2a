"""What every request passes first: its id, its limits, its key; and what becomes of its errors."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ziphius.serving.errors import ApiError, as_api_error
from ziphius.serving.hosts import check_host
from ziphius.serving.options import ServeOptions
from ziphius.serving.sse import ClientGone

LOG = logging.getLogger("ziphius.serving")
ACCESS = logging.getLogger("ziphius.access")

_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,64}")
# These need a key where keys are set; the page, health and metrics don't.
GUARDED = ("/v1/", "/tokenize", "/detokenize", "/tokenizer_info")
ADMIN = "/admin/"
# Answered at any time: those who look after the server must see it when it is full or ending.
ALWAYS = ("/health", "/ready", "/metrics")


@dataclass
class Noted:
    """What a route tells the log of its request."""

    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str | None = None
    error: str | None = None
    # What tells the caches of API keys apart.
    tenant: bytes = b""
    # Of the engine's work, by our clock: began, first (token), last.
    times: dict[str, float] = field(default_factory=dict)
    # Called when the request leaves, however it does: what it holds is given back.
    closing: list[Callable[[], None]] = field(default_factory=list)
    # Tells of the client's leaving, behind the body.
    receive: Receive | None = None


class Gate:
    """The outermost ASGI layer. Every request leaves it with one answer and one line in the log."""

    def __init__(
        self,
        app: ASGIApp,
        options: ServeOptions,
        *,
        on_answer: Callable[[Passing, str], None] = lambda request, route: None,
    ) -> None:
        self._app, self._options, self._on_answer = app, options, on_answer
        self.draining = False
        self.open = 0
        self._of_client: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Passing(scope, receive, send, self._options.limits)
        self.open += 1
        try:
            await self._answer(request)
        finally:
            for close in request.noted.closing:
                close()
            self.open -= 1
            request.status = request.final_status(scope.get("refused"))
            self._on_answer(request, _route(request.scope))
            _log(request, scope, request.status)

    async def _answer(self, request: Passing) -> None:
        try:
            with self._admitted(request.scope):
                await self._app(request.scope, request.receive, request.send)
        except ClientGone:
            request.noted.finish = "client gone"
        except Exception as error:
            told = as_api_error(error, request.id)
            if told.status == 500 and not isinstance(error, ApiError):
                LOG.exception("request %s failed", request.id)
            request.noted.error = str(told)
            if request.status is None:
                await told.response()(request.scope, request.receive, request.send)

    def _admitted(self, scope: Scope) -> _Counted:
        """Refuse what may not or cannot be answered now; count the rest until it is answered."""
        path, limits = scope["path"], self._options.limits
        check_host(scope, self._options.allowed_hosts)
        if path in ALWAYS:
            return _Counted(Counter(), "")
        key = self._checked_key(path, keys_of(scope))
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry=5)
        if self.open > limits.max_open:
            raise ApiError(503, f"{self.open} requests are open", code="server_full", retry=1)
        client = key or (scope.get("client") or ("",))[0]
        if key:
            scope["noted"].tenant = hashlib.sha256(key.encode()).digest()
        if path.startswith(GUARDED) and self._of_client[client] >= limits.max_per_client:
            raise ApiError(
                429,
                f"{limits.max_per_client} requests of yours are open: let one end first",
                code="too_many_requests",
                retry=1,
            )
        return _Counted(self._of_client, client)

    def _checked_key(self, path: str, keys: list[str]) -> str:
        """Return the key of a request that opens its path, of several the one that does."""
        if path.startswith(ADMIN):
            admin = self._options.admin_key
            if admin is None:
                raise ApiError(403, "admin routes are off: start the server with an admin key")
            key = known_key(keys, [admin])
            if key is None:
                raise ApiError(401, "this route needs the admin key", code="invalid_api_key")
            return key
        key = known_key(keys, self._options.api_keys)
        if key is None and path.startswith(GUARDED) and self._options.api_keys:
            raise ApiError(
                401,
                "a valid API key is needed: send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return key or ""


class _Counted:
    """One more open request of a client, for a while."""

    def __init__(self, counter: Counter[str], client: str) -> None:
        self._counter, self._client = counter, client

    def __enter__(self) -> None:
        self._counter[self._client] += 1

    def __exit__(self, *raised: object) -> None:
        self._counter[self._client] -= 1
        if not self._counter[self._client]:
            del self._counter[self._client]


class Passing:
    """One request on its way through: its channels, bounded in bytes and in time."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Any) -> None:
        self.began = time.monotonic()
        self.status: int | None = None
        self.noted = Noted(receive=self.receive)
        # In the connection's own scope: what it refuses of this request bears the same id.
        self.id: str = scope.setdefault("request_id", request_id(scope))
        self.scope = {**scope, "noted": self.noted}
        self._receive, self._send, self._limits = receive, send, limits
        self._body_bytes, self._body_ended = 0, False
        self.left = False  # the client, before its body's end

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.began

    def final_status(self, refused: ApiError | None) -> int:
        """Return what the client was answered; ``refused``: by its connection, behind our back."""
        if refused is not None:
            self.noted.error = str(refused)
            return refused.status
        return 499 if self.left else self.status or 499

    async def receive(self) -> Message:
        """Return the next piece of the body. Raises HTTPException beyond the limits.

        FastAPI, which reads the body, lets no other exception through.
        """
        if self._body_ended:
            return await self._receive()
        left = self._limits.body_seconds - self.seconds
        try:
            async with asyncio.timeout(max(left, 0)):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body did not arrive in time") from None
        self.left = message["type"] == "http.disconnect"
        if message["type"] == "http.request":
            self._body_bytes += len(message.get("body", b""))
            self._body_ended = not message.get("more_body", False)
            if self._body_bytes > self._limits.max_body_bytes:
                most = self._limits.max_body_bytes
                raise HTTPException(413, f"the body has more than {most} bytes")
        return message

    async def send(self, message: Message) -> None:
        """Send a piece of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.id.encode())]
            headers.append((b"request-id", self.id.encode()))  # where Anthropic's clients look
            headers.append((b"x-content-type-options", b"nosniff"))
            message = {**message, "headers": headers}
        await self._send(message)


def _log(request: Passing, scope: Scope, status: int) -> None:
    if scope["path"] in ALWAYS and status < 400:
        return  # every few seconds, by whoever watches
    noted = request.noted
    fields = {
        "request_id": request.id,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(request.seconds, 3),
        **{
            name: value
            for name in ("model", "prompt_tokens", "completion_tokens", "finish", "error")
            if (value := getattr(noted, name)) is not None
        },
    }
    ACCESS.info("request", extra={"fields": fields})


def _route(scope: Scope) -> str:
    """Return the path as routes have it: of any path that is none, one name."""
    route = scope.get("route")
    return getattr(route, "path", "other")


def request_id(scope: Scope) -> str:
    """Return the client's own id where it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value.decode())
    return new_request_id()


def new_request_id() -> str:
    """Return an id for a request that has none."""
    return f"req-{secrets.token_hex(12)}"


def keys_of(scope: Scope) -> list[str]:
    """Return a request's keys, as OpenAI's clients send them, and Anthropic's: some send both."""
    found = []
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            found.append(str(value[7:].decode("latin-1")).strip())
        elif name == b"x-api-key":
            found.append(str(value.decode("latin-1")).strip())
    return found


def known_key(given: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the first given key that is known. All are compared, so that time tells nothing."""
    found = [one for one in given if sum(_equal(one, other) for other in known)]
    return found[0] if found else None


def _equal(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(), known.encode())
