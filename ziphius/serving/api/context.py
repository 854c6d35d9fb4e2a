"""What the routes are made with, and what several of them do."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from ziphius import __version__
from ziphius.serving.api.sampling import Body, SamplingFields
from ziphius.serving.engine import EngineProcess
from ziphius.serving.errors import ApiError, as_api_error
from ziphius.serving.gate import Noted
from ziphius.serving.link import Job
from ziphius.serving.options import ServeOptions
from ziphius.serving.served import Served
from ziphius.serving.sse import ClientGone, data

T = TypeVar("T")
LOG = logging.getLogger("ziphius.serving")

# Texts longer than this are cut into tokens on a thread: nobody else's stream waits for it.
_LONG = 20_000


@dataclass(frozen=True)
class Context:
    """The server's parts, as the routes need them."""

    options: ServeOptions
    engine: EngineProcess
    served: Served

    @property
    def fingerprint(self) -> str:
        """Name what makes answers repeatable: the version, and the engine's arithmetic."""
        link = self.engine.link
        dtype = link.model.dtype if link is not None and link.model is not None else "none"
        return f"ziphius-{__version__}-{dtype}"

    def require_model(self, name: str | None) -> None:
        """Raise ApiError for the name of another model."""
        if name is not None and name != self.served.name:
            raise ApiError(
                404,
                f"model '{name[:100]}' is not here: this server has '{self.served.name}'",
                code="model_not_found",
                param="model",
            )

    def job(self, prompt_ids: list[int], params: Any, fields: SamplingFields, **more: Any) -> Job:
        """Return a job with the route's shared fields."""
        return Job(
            prompt_ids=prompt_ids,
            params=params,
            priority=fields.priority or 0,
            salt=(fields.cache_salt or "").encode("utf-8", "replace"),
            seconds=self.options.limits.request_seconds,
            **more,
        )

    async def aside(self, size: int, function: Callable[..., T], *given: Any, **named: Any) -> T:
        """Call a function of a text of ``size`` characters, on a thread where it is long."""
        if size < _LONG:
            return function(*given, **named)
        return await asyncio.to_thread(function, *given, **named)


def noted(request: Request) -> Noted:
    """Return what the log will say of a request."""
    found: Noted = request.scope["noted"]
    return found


def new_id(prefix: str) -> str:
    """Return an id for an answer."""
    return f"{prefix}{secrets.token_hex(16)}"


def told(fields: Body) -> dict[str, str]:
    """Return the header that names the fields which were passed over."""
    names = [name for name in fields.ignored() if name.isascii() and name.isidentifier()]
    return {"x-ziphius-ignored-fields": ",".join(names)[:200]} if names else {}


async def guarded(
    request: Request, events: AsyncIterator[bytes], *, shape: Callable[[Any], bytes] = data
) -> AsyncGenerator[bytes]:
    """Yield a stream's events. An error after the first byte becomes one more event, the last."""
    try:
        async for body in events:
            yield body
    except ClientGone:
        raise
    except Exception as error:
        request_id = request.scope["request_id"]
        found = as_api_error(error, request_id)
        if found.status == 500 and found.code is None:
            LOG.exception("request %s failed in its stream", request_id)
        noted(request).error = str(found)
        yield shape(found.body)
    finally:
        await events.aclose()  # type: ignore[attr-defined]
