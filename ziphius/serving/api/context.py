"""What the routes are made with, and what several of them do."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request

from ziphius import __version__
from ziphius.config.errors import BadInput
from ziphius.inference.params import SamplingParams
from ziphius.serving.api.sampling import Body, SamplingFields
from ziphius.serving.engine import EngineProcess
from ziphius.serving.errors import ApiError, ContextExceeded, as_api_error
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

    @property
    def length(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None while the model loads."""
        link = self.engine.link
        return link.model.context if link is not None and link.model is not None else None

    def job(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        fields: SamplingFields,
        noted: Noted,
        *,
        score_only: bool = False,
    ) -> Job:
        """Return a job with the route's shared fields, and an answer that ends with the context.

        Raises ContextExceeded for a prompt that leaves no room, and BadInput for a priority where
        all requests are alike.
        """
        if fields.priority and not self.options.priorities:
            raise BadInput("priority: this server takes requests as they come: leave it out")
        if self.length is not None:
            room = self.length - len(prompt_ids)
            if room < 1:
                raise ContextExceeded(
                    f"the prompt has {len(prompt_ids)} tokens and the context {self.length}, the "
                    "answer included: shorten the prompt"
                )
            params = replace(params, max_tokens=min(params.max_tokens or room, room))
        return Job(
            prompt_ids=prompt_ids,
            params=params,
            # As vLLM has it, whose field it is: the lower, the sooner.
            priority=-(fields.priority or 0),
            # What one key has sent is not found in the cache by another.
            salt=noted.tenant + (fields.cache_salt or "").encode("utf-8", "replace"),
            seconds=self.options.limits.request_seconds,
            score_only=score_only,
        )

    def kept(self, token_ids: list[int], fields: SamplingFields) -> list[int]:
        """Return the last tokens of a prompt, as many as are to be kept. Raises BadInput for 0."""
        most = fields.truncate_prompt_tokens
        if most == 0:
            raise BadInput("truncate_prompt_tokens = 0: keep a token at least; -1 keeps what fits")
        if most == -1:
            most = max(1, (self.length or 2) - 1)
        return token_ids if most is None else token_ids[-most:]

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
