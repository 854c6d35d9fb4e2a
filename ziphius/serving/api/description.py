"""What ``/openapi.json`` says of every route beside its own fields: errors, keys, answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ziphius.serving.api.documents import ErrorBody
from ziphius.serving.gate import ADMIN, ALWAYS, GUARDED
from ziphius.serving.options import ServeOptions

_SCHEMAS = "#/components/schemas/{model}"
_STREAM = (
    "With `stream`: events of one line `data: {...}` each, and at the end `data: [DONE]`. An error "
    "after the first byte is an event like any error's body, and the last one. A line that begins "
    "with `:` is a comment."
)
# Statuses by what brings them: the name of the response below components, and what it says.
_ERRORS = {
    "400": ("Invalid", "The request can't be answered as it is: `param` names the field."),
    "401": ("NoKey", "A key that the server knows is needed."),
    "403": ("Forbidden", "Administration is off: the server was started without an admin key."),
    "404": ("NotFound", "There is no such model, or no such thing."),
    "408": ("TooSlow", "The body did not arrive in time."),
    "413": ("TooLarge", "The body has too many bytes."),
    "429": ("TooMany", "Too many requests of this client are open: try again after Retry-After."),
    "500": ("Failed", "The answer failed, or the server did: its log has the request's id."),
    "503": ("Busy", "No room, or no engine at the moment: try again after Retry-After."),
    "504": ("TimedOut", "The answer took longer than the server allows."),
}
_RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_REQUEST_ID = {"x-request-id": {"description": "As in the log.", "schema": {"type": "string"}}}


def answers(model: type[BaseModel], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's ``responses`` of a route that answers with a model's shape."""
    found: dict[str, Any] = {"model": model}
    if streams:
        event = {"schema": {"type": "string", "description": _STREAM}}
        found["content"] = {"text/event-stream": event}
    return {200: found}


def describe(document: dict[str, Any], options: ServeOptions) -> dict[str, Any]:
    """Add errors and keys to FastAPI's own description, in place; return it."""
    document["x-chat-page"] = options.page  # /docs links to it where there is one
    schemas = document["components"].setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nobody gets
        schemas.pop(name, None)
    error = ErrorBody.model_json_schema(ref_template=_SCHEMAS)
    schemas.update(error.pop("$defs"))
    schemas[ErrorBody.__name__] = error
    document["components"]["responses"] = {
        name: _response(status, told) for status, (name, told) in _ERRORS.items()
    }
    if options.api_keys or options.admin_key:
        scheme = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"key": scheme}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            _complete(path, operation, options)
            _name_model(operation, schemas, options.model_name)
    return document


def _response(status: str, told: str) -> dict[str, Any]:
    schema = {"$ref": _SCHEMAS.format(model=ErrorBody.__name__)}
    headers = {**_REQUEST_ID, **(_RETRY if status in ("429", "503") else {})}
    return {
        "description": told,
        "headers": headers,
        "content": {"application/json": {"schema": schema}},
    }


def _name_model(operation: dict[str, Any], schemas: dict[str, Any], name: str) -> None:
    """Say which model a request may ask for."""
    for media in operation.get("requestBody", {}).get("content", {}).values():
        schema = schemas.get(media["schema"].get("$ref", "").rpartition("/")[2], {})
        if "model" in schema.get("properties", {}):
            known = {"anyOf": [{"const": name}, {"type": "null"}], "title": "Model"}
            schema["properties"]["model"] = known


def _complete(path: str, operation: dict[str, Any], options: ServeOptions) -> None:
    """Say what may go wrong on one route, and whether it needs a key."""
    responses = operation["responses"]
    responses.pop("422", None)  # it is 400 here
    if path in ALWAYS:
        return
    statuses = ["429", "500", "503"]
    keyed = bool(options.api_keys) if path.startswith(GUARDED) else bool(options.admin_key)
    if path.startswith(ADMIN):
        statuses.append("403" if options.admin_key is None else "401")
    elif path.startswith(GUARDED) and keyed:
        statuses.append("401")
    if "401" in statuses:
        operation["security"] = [{"key": []}]
    if "requestBody" in operation:
        statuses += ["400", "404", "408", "413"]
    if "parameters" in operation:
        statuses += ["400", "404"]
    if "answers" in operation.get("tags", ()):
        statuses.append("504")
    for status in sorted(set(statuses)):
        responses.setdefault(status, {"$ref": f"#/components/responses/{_ERRORS[status][0]}"})
