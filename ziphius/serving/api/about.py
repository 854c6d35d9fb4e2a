"""What is served, and how it is: models, health, metrics, and what only an operator may."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from ziphius.serving.api.context import Context
from ziphius.serving.api.description import answers
from ziphius.serving.api.documents import Cleared, Health, Model, Models, Readiness, Restarting
from ziphius.serving.api.shapes import json_response
from ziphius.serving.gate import Gate
from ziphius.serving.metrics import Metrics


def router(context: Context, metrics: Metrics, gate: Gate) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["server"])
    engine = context.engine

    @routes.get("/v1/models", summary="List models", response_model=None, responses=answers(Models))
    async def models() -> Response:
        """List the one model."""
        return json_response({"object": "list", "data": [card(context)]})

    @routes.get(
        "/v1/models/{model:path}",
        summary="Describe a model",
        response_model=None,
        responses=answers(Model),
    )
    async def model(model: str) -> Response:
        """Describe the model."""
        context.require_model(model)
        return json_response(card(context))

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", response_model=None, responses=_either(Health))
    async def health() -> Response:
        """Say whether the engine answers. 503 while it loads, and when it stands still."""
        state = engine.state
        body = {"status": "ok" if state == "ready" else state, "detail": engine.why(state)}
        return json_response(body, status=200 if state == "ready" else 503)

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready", response_model=None, responses=_either(Readiness))
    async def ready() -> Response:
        """Say whether new requests are taken: no longer once the server shuts down."""
        state = "draining" if gate.draining else engine.state
        return json_response({"status": state}, status=200 if state == "ready" else 503)

    @routes.get(
        "/metrics", summary="Metrics", response_model=None, response_class=PlainTextResponse
    )
    async def prometheus() -> Response:
        """Give the numbers that Prometheus reads."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.post(
        "/admin/cache/clear",
        summary="Clear the cache",
        response_model=None,
        responses=answers(Cleared),
    )
    async def clear(request: Request) -> Response:
        """Drop the cached prefixes that nobody uses."""
        engine.forget()
        return json_response({"cleared": True})

    @routes.post(
        "/admin/engine/restart",
        summary="Restart the engine",
        response_model=None,
        responses=answers(Restarting),
    )
    async def restart(request: Request) -> Response:
        """Start the engine again; what runs ends with an error."""
        engine.restart()
        return json_response({"restarting": True})

    return routes


def _either(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the responses of a route that says no with the same shape."""
    return {**answers(model), 503: {"model": model, "description": "Not now."}}


def card(context: Context) -> dict[str, Any]:
    """Describe the model, and under ``ziphius`` what the chat page wants to know."""
    served, link = context.served, context.engine.link
    model = link.model if link is not None else None
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "ziphius",
        "root": served.name,
        "max_model_len": context.length,
        "ziphius": {
            "chat": served.chats,
            "thinking": served.thinking,
            "tools": served.has_tools,
            "speculation": model is not None and model.speculation != "off",
            "parameters": model.parameters if model is not None else None,
            "dtype": model.dtype if model is not None else None,
            "defaults": served.defaults,
        },
    }
