"""Tools that a model may call: their definitions, and how they are told to it in words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import TOOL_TOKENS

# ``fenced`` is V3's and R1's: a type, the name, and a fence of JSON around the arguments. ``plain``
# is V3.1's: name and arguments alone.
CallStyle = Literal["fenced", "plain"]

CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END = TOOL_TOKENS[:4]
OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END, SEPARATOR = TOOL_TOKENS[4:]

# OpenAI's, with the punctuation that names of other makers have.
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(NamedTuple):
    """One function. ``parameters`` is the JSON schema that its arguments follow; ``strict`` asks
    that they do so whatever the model would rather write.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool


def check_tools(tools: Any) -> tuple[Tool, ...]:
    """Read tools as OpenAI's clients send them: ``{"type": "function", "function": {...}}``.

    Raises BadInput for what is none, and for two of one name. None stands for an empty list.
    """
    if tools is None:
        return ()
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise BadInput("tools: give a list of objects with 'type' and 'function'")
    read = tuple(_tool(tool, f"tools[{place}]") for place, tool in enumerate(tools))
    seen: set[str] = set()
    for tool in read:
        if tool.name in seen:
            raise BadInput(f"tools: two are named '{tool.name}': give each a name of its own")
        seen.add(tool.name)
    return read


def tools_text(tools: Sequence[Tool], style: CallStyle) -> str:
    """Return what a system message says of ``tools`` and of how to call them.

    The words are ours. A model was trained on others, which its checkpoint's own template may have:
    where it does, they are the ones to use.
    """
    parts = ["You can use these tools."]
    for tool in tools:
        about = f"{tool.description}\n" if tool.description else ""
        parts.append(f"### {tool.name}\n{about}Arguments (JSON schema): {as_json(tool.parameters)}")
    example = {"name": "TOOL", "arguments": '{"ARGUMENT": "VALUE"}'}
    parts.append(
        "To use tools, end your message with the block below. It holds one entry for each call; "
        "the arguments are a JSON object that follows the tool's schema. The results come in the "
        f"next message.\n{calls_text([{'function': example}], style)}"
    )
    return "\n\n".join(parts)


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], style: CallStyle
) -> list[dict[str, Any]]:
    """Return messages whose first, a system message, tells of ``tools`` too.

    ``messages`` have their text as one string each.
    """
    text, rest = tools_text(tools, style), [dict(message) for message in messages]
    if rest and rest[0]["role"] == "system":
        said = rest.pop(0)["content"]
        text = f"{said}\n\n{text}" if said else text
    return [{"role": "system", "content": text}, *rest]


def calls_text(calls: Sequence[Mapping[str, Any]], style: CallStyle) -> str:
    """Render the calls of an assistant's message. Arguments are JSON text, or an object."""
    return CALLS_BEGIN + _JOINED[style].join(_call(c, style) for c in calls) + CALLS_END


def as_json(value: Any, indent: int | None = None) -> str:
    """Return JSON as a model reads it: no letter is escaped that need not be."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


_JOINED: Mapping[CallStyle, str] = {"fenced": "\n", "plain": ""}


def _call(call: Mapping[str, Any], style: CallStyle) -> str:
    function = call["function"]
    given = function["arguments"]
    name, text = function["name"], given if isinstance(given, str) else as_json(given)
    if style == "plain":
        return f"{CALL_BEGIN}{name}{SEPARATOR}{text}{CALL_END}"
    head = f"{CALL_BEGIN}{call.get('type', 'function')}{SEPARATOR}{name}"
    return f"{head}\n```json\n{text}\n```{CALL_END}"


def _tool(tool: Any, where: str) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise BadInput(f"{where}: give an object with type 'function' and 'function'")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadInput(
            f"{where}: function.name = {name!r}: use up to 128 letters, digits and _ - . : /"
        )
    if description is not None and not isinstance(description, str):
        raise BadInput(f"{where}: function.description = {description!r}: give text")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, Mapping):
        raise BadInput(f"{where}: function.parameters: give a JSON schema, an object")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise BadInput(f"{where}: function.strict = {strict!r}: use true or false")
    return Tool(name, description or "", parameters, bool(strict))
