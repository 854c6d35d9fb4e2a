"""JSON answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response


def json_response(
    body: Any, headers: Mapping[str, str] | None = None, status: int = 200
) -> Response:
    """Return a whole answer; a number that JSON has not becomes null."""
    return Response(orjson.dumps(body), status, dict(headers or {}), "application/json")
