"""The client: one server, and one request's measurements."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal, NamedTuple

import aiohttp

from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.serving.bench.outcome import REFUSED, Outcome, read_outcome
from ziphius.serving.bench.prompts import Prompt
from ziphius.serving.bench.stream import Fault, Reader, message_of, one_line

Endpoint = Literal["chat", "completions"]
PATHS: Mapping[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
ENDPOINTS = tuple(PATHS)
REFUSALS = (429, 503)
# Shorter than servers keep an idle connection: a request must not meet one that is being closed.
_KEEP_SECONDS = 2.0
_WAIT_SECONDS = 1.0  # until a refused request comes again, where the server does not say
_SHORT = aiohttp.ClientTimeout(total=30)
_NONE = aiohttp.ClientTimeout(total=None)


class Dialect(NamedTuple):
    """What servers differ in: the name of the limit, and whether every chunk may have a usage."""

    limit: str = "max_tokens"
    running: bool = True


# Tried in this order; every server known speaks one of them.
DIALECTS = (Dialect(), Dialect(running=False), Dialect("max_completion_tokens", running=False))


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How to ask. ``timeout`` is seconds for a request with all its retries.

    ``cold`` gives every request a salt of its own, so that a server that knows ``cache_salt`` finds
    nothing in its prefix cache. ``extra`` is added to the body.
    """

    endpoint: Endpoint = "chat"
    model: str | None = None
    output_tokens: int = 128
    temperature: float = 0.0
    timeout: float = 300.0
    retry: bool = False
    ignore_eos: bool = False
    cold: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


class Client:
    """Asks one server, over as many connections as there are requests. Use it in ``async with``.

    ``url`` is the server's, with or without ``/v1``.
    """

    def __init__(self, url: str, asking: Asking, api_key: str | None = None) -> None:
        self.url = base_url(url)
        self.asking, self.model = asking, asking.model or ""
        self.dialect = DIALECTS[0]
        self.server: dict[str, Any] = {"url": self.url}
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._numbered = 0

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS),
            headers=self._headers,
            timeout=_NONE,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    # --- before the load --------------------------------------------------------------------------

    async def meet(self) -> None:
        """Learn the server's model. Raises ZiphiusError where there is no server to ask."""
        status, body, headers = await self._call("GET", "/v1/models")
        if status in (401, 403):
            raise BadInput(f"{self.url}: {status}: {message_of(body)}: give its key with --api-key")
        listed = body.get("data") if status == 200 and isinstance(body, dict) else None
        models = [m for m in listed or () if isinstance(m, dict) and m.get("id")]
        named = {m["id"]: m for m in models}
        if not self.model:
            if not models:
                raise BadInput(f"{self.url}: lists no model at /v1/models: name one with --model")
            self.model = str(models[0]["id"])
        elif named and self.model not in named:
            shown = ", ".join(map(str, named))
            raise BadInput(f"{self.url}: has no model '{self.model}': it has {shown}")
        entry = named.get(self.model, {})
        self.server |= {"model": self.model, "software": headers.get("Server")}
        self.server |= {k: entry[k] for k in ("owned_by", "max_model_len") if k in entry}

    async def learn_dialect(self, prompt: Prompt) -> Outcome:
        """Find how the server wants to be asked, with a request that is not counted.

        Raises ZiphiusError where it refuses every form.
        """
        for dialect in DIALECTS:
            self.dialect = dialect
            outcome = await self.ask(0, prompt)
            kind = outcome.fault.kind if outcome.fault else ""
            if kind not in ("http 400", "http 422"):
                break
        if outcome.fault is not None and kind.startswith("http 4"):
            code = kind.removeprefix("http ")
            key = ": give its key with --api-key" if code in ("401", "403") else ""
            raise ZiphiusError(
                f"{self.url}{PATHS[self.asking.endpoint]} refuses what it is asked: "
                f"{code}: {outcome.fault.message}{key}"
            )
        return outcome

    async def tokenize(self, text: str) -> list[int] | None:
        """Return a text's token ids by the server's ``/tokenize``; None where it has none."""
        asked = {"model": self.model, "prompt": text, "add_special_tokens": False}
        status, body, _ = await self._call("POST", "/tokenize", asked)
        tokens = body.get("tokens") if status == 200 and isinstance(body, dict) else None
        if isinstance(tokens, list) and tokens and all(type(t) is int for t in tokens):
            return tokens
        return None

    async def _call(
        self, method: str, path: str, asked: Any = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        try:
            async with self._session.request(
                method, self.url + path, json=asked, timeout=_SHORT, allow_redirects=False
            ) as response:
                raw = await response.read()
                return response.status, _parsed(raw), response.headers
        except aiohttp.InvalidURL:
            raise BadInput(f"{self.url} is no address of a server: give http://HOST:PORT") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ZiphiusError(self.unreachable(error)) from None

    def unreachable(self, error: BaseException) -> str:
        """Say in one line why there is no server, and what to do."""
        said = _reason(error)
        if "refused" in said:
            said += ": start a server with 'ziphius serve CHECKPOINT', or check host and port"
        return f"{self.url}: {said}"

    # --- a request --------------------------------------------------------------------------------

    async def ask(self, number: int, prompt: Prompt, due: float | None = None) -> Outcome:
        """Send a prompt and measure what comes back.

        ``due`` is when it was to be sent, in seconds of ``time.monotonic``, by default now.
        """
        sent = time.monotonic()
        began = sent if due is None else due
        reader = Reader()
        refusals = _Refusals()
        fault = None
        try:
            async with asyncio.timeout(self.asking.timeout):
                fault = await self._until_taken(prompt, reader, refusals)
        except TimeoutError:
            seconds = f"{self.asking.timeout:g} s"
            fault = Fault("timeout", f"no end after {seconds} and {len(reader.pieces)} chunks")
            if refusals.waiting:
                fault = Fault(REFUSED, f"{refusals.count} times in {seconds}")
        except (aiohttp.ClientError, OSError) as error:
            begun = bool(reader.pieces)
            after = f" after {len(reader.pieces)} chunks" if begun else ""
            fault = Fault("cut off" if begun else "connection", f"{_reason(error)}{after}")
        reader.end()
        reader.fault = fault or reader.fault
        return read_outcome(
            reader,
            prompt=number,
            began=began,
            ended=time.monotonic(),
            most=self.asking.output_tokens,
            late=sent - began,
            refusals=refusals.count,
            hints=refusals.hints,
        )

    async def _until_taken(
        self, prompt: Prompt, reader: Reader, refusals: _Refusals
    ) -> Fault | None:
        """Send, and send again what is refused, if that is wanted."""
        while True:
            fault, wait = await self._send(prompt, reader, refusals)
            if fault is None or fault.kind != REFUSED or not self.asking.retry:
                return fault
            refusals.waiting = True
            await asyncio.sleep(wait)
            refusals.waiting = False

    async def _send(
        self, prompt: Prompt, reader: Reader, refusals: _Refusals
    ) -> tuple[Fault | None, float]:
        async with self._session.post(
            self.url + PATHS[self.asking.endpoint],
            json=self.body(prompt),
            headers={"Accept": "text/event-stream"},
            allow_redirects=False,
        ) as response:
            if response.status != 200:
                message = message_of(_parsed(await response.read()))
                if response.status not in REFUSALS:
                    return Fault(f"http {response.status}", message), 0.0
                wait = retry_after(response.headers)
                refusals.count += 1
                refusals.hints += wait is not None
                return Fault(REFUSED, f"{response.status}: {message}"), _pause(wait)
            if response.content_type != "text/event-stream":
                said = f"no event stream but {response.content_type}"
                return Fault("malformed", f"{said}: {one_line(await response.read())}"), 0.0
            async for data in response.content.iter_any():
                reader.feed(time.monotonic(), data)
            return None, 0.0

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Return what is sent for a prompt."""
        asking = self.asking
        if asking.endpoint == "completions":
            asked = {"prompt": prompt.value}
        elif prompt.kind == "messages":
            asked = {"messages": prompt.value}
        else:
            asked = {"messages": [{"role": "user", "content": prompt.value}]}
        usage = {"include_usage": True} | (
            {"continuous_usage_stats": True} if self.dialect.running else {}
        )
        body = {
            "model": self.model,
            **asked,
            self.dialect.limit: asking.output_tokens,
            "temperature": asking.temperature,
            "stream": True,
            "stream_options": usage,
        }
        if asking.ignore_eos:
            body["ignore_eos"] = True
        if asking.cold:
            self._numbered += 1
            body["cache_salt"] = f"bench-{time.time_ns()}-{self._numbered}"
        return body | dict(asking.extra)


@dataclass
class _Refusals:
    """What a request has met so far of 429 and 503."""

    count: int = 0
    hints: int = 0
    waiting: bool = False


def base_url(url: str) -> str:
    """Return a server's address without a path of the API. Raises BadInput for no address."""
    given = url if "://" in url else f"http://{url}"
    if not given.startswith(("http://", "https://")) or not given.split("://")[1].strip("/"):
        raise BadInput(f"{url} is no address of a server: give http://HOST:PORT")
    return given.rstrip("/").removesuffix("/v1").rstrip("/")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a refusal asks to wait, or None where it doesn't say."""
    for name, unit in (("retry-after-ms", 1e-3), ("Retry-After", 1.0)):
        value = headers.get(name, "").strip()
        if value.replace(".", "", 1).isdigit():
            return float(value) * unit
        if value:
            try:
                return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
            except (ValueError, TypeError):
                continue
    return None


def _pause(asked: float | None) -> float:
    """Return how long to wait before a request comes again; never so short that it is a storm."""
    return _WAIT_SECONDS if asked is None else max(asked, 0.05)


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return one_line(raw)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"no machine of that name ({error.host})"
    if isinstance(error, aiohttp.ClientConnectorError):
        # Several addresses of one name give one error with all of theirs in its text.
        refused = isinstance(error.os_error, ConnectionRefusedError)
        refused |= f"Errno {errno.ECONNREFUSED}]" in str(error.os_error)
        said = os.strerror(error.os_error.errno) if error.os_error.errno else error.os_error
        return "connection refused" if refused else one_line(said)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection broke off"
    return one_line(error)
