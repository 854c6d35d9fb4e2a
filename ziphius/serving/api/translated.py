"""What the formats beside chat have in common: their parts and tools become a chat's fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from ziphius.config.errors import BadInput
from ziphius.serving.api.conversation import ConversationFields
from ziphius.serving.api.sampling import SamplingFields


def conversation(fields: SamplingFields, **more: Any) -> ConversationFields:
    """Return a chat's fields: those that ``fields`` shares with it, and ``more``; None is nothing.

    Raises RequestValidationError for what no chat may have.
    """
    shared = {
        name: getattr(fields, name)
        for name in SamplingFields.model_fields
        if name in fields.model_fields_set
    }
    given = {name: value for name, value in more.items() if value is not None}
    try:
        return ConversationFields(**{**shared, **given})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def texts(content: Any, kinds: Collection[str], where: str) -> list[str]:
    """Return the texts of a content: one where it is a string, else one a part.

    ``kinds`` are the types of parts that hold text. Raises BadInput for any other part.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise BadInput(f"{where}: give a string, or a list of parts")
    return [_text(part, kinds, f"{where}[{place}]") for place, part in enumerate(content)]


def _text(part: Any, kinds: Collection[str], where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in kinds:
        raise BadInput(f"{where}: type = {kind!r}: this model reads text only")
    return string(part, "text", where)


def string(holder: Any, name: str, where: str) -> str:
    """Return an object's field that must be text. Raises BadInput where it is none."""
    value = holder.get(name) if isinstance(holder, Mapping) else None
    if not isinstance(value, str):
        raise BadInput(f"{where}.{name}: give a string")
    return value


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call of a tool as a chat's message has it."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def as_json(value: Any, what: str) -> bytes:
    """Return JSON of something that a client sent. Raises BadInput for what can't be repeated:
    text that is no Unicode, numbers beyond 64 bits, more than 250 levels.
    """
    try:
        return orjson.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{what}: cannot be repeated as JSON: {error}") from None
