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


def results_in_order(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the results of tools in the order of the calls that they answer.

    Templates render no ids: the model knows a result by its place alone. Raises BadInput for a
    result of no call of the message before, and for a call without a result.
    """
    ordered: list[dict[str, Any]] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        place += 1
        if message["role"] == "tool":
            raise BadInput(f"a result of '{message['tool_call_id'][:100]}': no call of that id")
        ordered.append(message)
        results: dict[str, dict[str, Any]] = {}
        while place < len(messages) and messages[place]["role"] == "tool":
            results.setdefault(messages[place]["tool_call_id"], messages[place])
            place += 1
        for made in message.get("tool_calls", ()):
            if made["id"] not in results:
                raise BadInput(f"the call '{made['id'][:100]}' has no result: send one behind it")
            ordered.append(results.pop(made["id"]))
        for unknown in results:
            raise BadInput(f"a result of '{unknown[:100]}': the message before has no such call")
    return ordered


def as_json(value: Any, what: str) -> bytes:
    """Return JSON of something that a client sent. Raises BadInput for what can't be repeated:
    text that is no Unicode, numbers beyond 64 bits, more than 250 levels.
    """
    try:
        return orjson.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{what}: cannot be repeated as JSON: {error}") from None
