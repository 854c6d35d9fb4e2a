"""The application: every route behind the gate, and the engine's life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ziphius import __version__
from ziphius.config.errors import ZiphiusError
from ziphius.serving.api import about, chat, completions, messages, responses, tokens
from ziphius.serving.api.context import Context
from ziphius.serving.api.description import describe
from ziphius.serving.engine import EngineProcess
from ziphius.serving.errors import handle
from ziphius.serving.gate import Gate, Passing
from ziphius.serving.hosts import ByHost
from ziphius.serving.metrics import Metrics
from ziphius.serving.options import ServeOptions
from ziphius.serving.pages import add_pages
from ziphius.serving.served import Served
from ziphius.serving.sse import ClientGone
from ziphius.serving.tracing import Tracing

LOG = logging.getLogger("ziphius.serving")


class Application:
    """The server's parts, put together. ``asgi`` is what uvicorn runs."""

    def __init__(
        self,
        options: ServeOptions,
        served: Served,
        engine: EngineProcess,
        tracing: Tracing | None = None,
    ) -> None:
        self.options, self.served, self.engine = options, served, engine
        self._tracing = tracing
        self.metrics = Metrics(
            served.name, lambda: engine.link, lambda: engine.state, lambda: engine.restarts
        )
        engine.on_link = self.metrics.watch
        self._engine_life: asyncio.Task[None] | None = None
        self.fastapi = FastAPI(
            title="Ziphius",
            version=__version__,
            description="DeepSeek-V3-family models, by OpenAI's and Anthropic's routes.",
            lifespan=self._lifespan,
            docs_url=None,  # ours is one of the pages: nothing of it comes from elsewhere
            redoc_url=None,
            redirect_slashes=False,  # it would go to wherever the request's Host says
        )
        self.gate = Gate(self.fastapi, options, on_answer=self._note)
        self.asgi: ASGIApp = self.gate
        if options.cors_origins:
            # Outside the gate: a browser asks first without a key, and must read refusals too.
            cors = CORSMiddleware(
                self.gate,
                allow_origins=list(options.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
            self.asgi = ByHost(options.allowed_hosts, cors, self.gate)
        self._add_routes()

    def _note(self, request: Passing, route: str) -> None:
        """Take down a request that has been answered."""
        self.metrics.answered(route, request.status or 0)
        if self._tracing is not None:
            request.noted.model = self.served.name
            self._tracing.record(request, route)

    def _add_routes(self) -> None:
        context = Context(self.options, self.engine, self.served)
        for router in (
            chat.router(context),
            completions.router(context),
            responses.router(context),
            messages.router(context),
            tokens.router(context),
            about.router(context, self.metrics, self.gate),
        ):
            self.fastapi.include_router(router)
        self.fastapi.openapi = self._openapi  # type: ignore[method-assign]
        for kind in (ZiphiusError, HTTPException, RequestValidationError, Exception):
            self.fastapi.add_exception_handler(kind, handle)
        self.fastapi.add_exception_handler(ClientGone, _gone)
        add_pages(self.fastapi, chat=self.options.page)

    def _openapi(self) -> dict[str, Any]:
        """Return the description of the routes, made once."""
        if self.fastapi.openapi_schema is None:
            described = describe(FastAPI.openapi(self.fastapi), self.options)
            self.fastapi.openapi_schema = described
        return self.fastapi.openapi_schema

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._engine_life = asyncio.create_task(self.engine.run(), name="engine")
        try:
            yield
        finally:
            await self.engine.stop()
            await self._engine_life
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)


async def _gone(request: Request, error: Exception) -> Response:
    """Answer nobody; the log says why."""
    request.scope["noted"].finish = "client gone"
    return Response(status_code=499)
