"""Errors as clients get them: OpenAI's shape, which Anthropic's clients read too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.inference.errors import RequestError
from ziphius.serving.link import Busy, EngineGone

_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
# Of what would end the same way again: OpenAI's clients repeat every 5xx that does not say so.
_ONCE: Mapping[str, str] = MappingProxyType({"x-should-retry": "false"})
_LONGEST = 500  # characters of a client's own input that a message repeats
TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(ZiphiusError):
    """An answer with an error. ``retry`` is the seconds of ``Retry-After``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})
        if retry is not None:
            self.headers["retry-after"] = str(retry)

    @property
    def body(self) -> dict[str, Any]:
        """The error as an object; ``type`` beside it is what Anthropic's clients look at."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        error = {
            "message": str(self), "type": kind, "param": self.param, "code": self.code or kind,
        }  # fmt: skip
        return {"type": "error", "error": error}

    def response(self) -> Response:
        """The whole answer."""
        return Response(encode(self.body), self.status, self.headers, "application/json")


class ContextExceeded(BadInput):
    """A prompt that leaves no room for an answer."""


class TimedOut(ZiphiusError):
    """A request was not answered within its time."""


def encode(body: Any) -> bytes:
    """Return JSON in ASCII: a client's text that is no Unicode, repeated, stays harmless."""
    return json.dumps(body).encode()


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """Return what a client is told of an exception; nothing of our insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(503, str(error), code="server_full", retry=error.seconds)
    if isinstance(error, EngineGone):
        return ApiError(503, str(error), code="engine_unavailable", retry=5)
    if isinstance(error, ContextExceeded):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, BadInput):
        return ApiError(400, _short(str(error)))
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), code="timeout", headers=_ONCE)
    if isinstance(error, RequestError):
        return ApiError(500, str(error), code="generation_failed", headers=_ONCE)
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        return _http(error)
    return ApiError(500, f"internal error: see the server's log for request {request_id}")


async def handle(request: Request, error: Exception) -> Response:
    """FastAPI's handler of the errors that are no failure of ours."""
    told = as_api_error(error, request.scope.get("request_id", ""))
    if told.status >= 500:  # the others may repeat what a client has sent: nothing for a log
        request.scope["noted"].error = str(told)
    if "Allow" in told.headers:
        told.headers["Allow"] = ", ".join(_methods(request))
    return told.response()


def _methods(request: Request) -> list[str]:
    """Return the methods that a path has: Starlette names those of one of its routes."""
    return [
        method
        for method in _METHODS
        for scope in [{**request.scope, "method": method}]
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]


def _invalid(problems: Sequence[Any]) -> ApiError:
    """Say of every field what is wrong with it."""
    told, param = [], None
    for problem in problems[:5]:
        place = [str(part) for part in problem["loc"] if part != "body"]
        if problem["type"] == "json_invalid":
            return ApiError(400, "the body is not valid JSON", code="invalid_json")
        if not place:
            wanted = "the body must be a JSON object, sent as content-type: application/json"
            return ApiError(400, wanted, code="invalid_type")
        # Of a field that may be one thing or another, the places name the things too.
        name = ".".join(part for part in place if part.isidentifier() or part.isdecimal())
        param = param or name or None
        told.append(f"{name}: {problem['msg']}")
    if len(problems) > 5:
        told.append(f"and {len(problems) - 5} more")
    message = "; ".join(dict.fromkeys(told))  # once each
    return ApiError(400, _short(message), param=param and _short(param), code="invalid_type")


def _http(error: HTTPException) -> ApiError:
    if error.status_code == 400:  # FastAPI's, of a body that it could not read
        return ApiError(400, "the body is no JSON in UTF-8, or is too deep", code="invalid_json")
    told = {
        404: "there is no such route: GET /openapi.json lists them",
        405: "this route has another method",
    }
    message = told.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
