"""What an answer's text must be: from the wire's formats and tools to a grammar of its tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ziphius.config.errors import BadInput, in_one_line
from ziphius.config.table import nearest
from ziphius.data.tokenizer import END_THINK
from ziphius.inference.grammar import as_lark, bounded_blanks, lark_regex
from ziphius.inference.tools import CallStyle, Tool, as_json
from ziphius.serving.parse import SPELLINGS, Markers

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_GUIDES = ("json", "json_object", "regex", "choice", "grammar")
_FORMATS = ("text", "json_object", "json_schema")
_CALL_MARKS = ("calls_begin", "calls_end", "call_begin", "call_end", "separator")
# Any text, of ordinary tokens alone: to a grammar the others are none.
_PROSE = "PROSE: /(?s:.*)/"


class _Text(NamedTuple):
    """What the content must be: the option of ``SamplingParams`` that says so by itself, and the
    definition of a rule ``text`` for a larger grammar.
    """

    option: Mapping[str, Any]
    rule: str


class Choice(NamedTuple):
    """Whether tools are called; ``tool`` is the only one that may be."""

    mode: Literal["none", "auto", "required"]
    tool: str | None = None


def structure(
    markers: Markers,
    style: CallStyle,
    *,
    in_reasoning: bool,
    response_format: Any = None,
    guided: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] = (),
    tool_choice: Any = None,
    parallel_tool_calls: bool | None = None,
) -> dict[str, Any]:
    """Return the fields of ``SamplingParams`` that make an answer keep to what was asked.

    ``in_reasoning``: the prompt has opened the reasoning, so the rules begin behind its end.
    ``guided`` has vLLM's options: one of json, json_object, regex, choice and grammar, also with
    ``guided_`` before them. Calls that must come, or whose arguments are ``strict``, are spelled as
    ``style`` has it. With ``tool_choice`` auto a format binds the content of an answer without
    calls. Nothing is returned where the answer is free.

    Raises BadInput for what is no such format or choice, and for what contradicts itself.
    """
    text = _text(response_format, guided)
    choice = check_choice(tool_choice, tools)
    if choice.mode == "required":
        if guided:
            raise BadInput("tool_choice asks for a call and a guided option for text: give one")
        named = [t for t in tools if choice.tool in (None, t.name)]
        calls = _calls(markers, style, named, parallel_tool_calls is not False)
        return _grammar(_reasoning(markers, in_reasoning), "calls", calls)
    if choice.mode == "none":
        banned = [markers.calls_begin, markers.call_begin] if tools and text is None else []
        found = [token for token in banned if token is not None]
        plain = {"banned_token_ids": tuple(found)} if found else {}
        return plain if text is None else _only(text, markers, in_reasoning)
    bound = any(tool.strict for tool in tools) or parallel_tool_calls is False
    able = all(getattr(markers, name) is not None for name in _CALL_MARKS)
    if not bound and (text is None or not able):
        return {} if text is None else _only(text, markers, in_reasoning)
    calls = _calls(markers, style, tools, parallel_tool_calls is not False)
    if text is not None:
        return _grammar(_reasoning(markers, in_reasoning), "text | calls", [text.rule, *calls])
    head = _reasoning(markers, in_reasoning) or _own_reasoning(markers)
    return _grammar(head, "PROSE calls?", [_PROSE, *calls])


def check_choice(tool_choice: Any, tools: Sequence[Tool]) -> Choice:
    """Read ``tool_choice``; None is auto where there are tools.

    Raises BadInput for what is none, and for a tool that was not given.
    """
    name = None
    if isinstance(tool_choice, Mapping):
        given = tool_choice.get("function", tool_choice)
        name = given.get("name") if isinstance(given, Mapping) else None
        if tool_choice.get("type", "function") != "function" or not isinstance(name, str):
            raise BadInput("tool_choice: give {'type': 'function', 'function': {'name': ...}}")
        if name not in (known := [tool.name for tool in tools]):
            raise BadInput(f"tool_choice: tool '{name}' is not among tools{nearest(name, known)}")
        return Choice("required", name)
    if tool_choice is None or tool_choice == "auto":
        return Choice("auto" if tools else "none")
    if tool_choice == "none":
        return Choice("none")
    if tool_choice != "required":
        raise BadInput(
            f"tool_choice = {tool_choice!r}: use none, auto, required or an object that names one"
        )
    if not tools:
        raise BadInput("tool_choice = 'required': there are no tools to call")
    return Choice("required")


# --- the content ----------------------------------------------------------------------------------


def _text(response_format: Any, guided: Mapping[str, Any] | None) -> _Text | None:
    wanted = _format(response_format)
    options = {
        name.removeprefix("guided_"): value
        for name, value in (guided or {}).items()
        if value is not None and value is not False
    }
    for name in options:
        if name not in _GUIDES:
            raise BadInput(f"guided option '{name}'{nearest(name, _GUIDES)}")
    if len(options) + (wanted is not None) > 1:
        given = [*options, *(["response_format"] if wanted is not None else [])]
        raise BadInput(f"{' and '.join(given)}: give one format at most")
    for name, value in options.items():
        return _guide(name, value)
    return None if wanted is None else _json(wanted, "response_format")


def _format(response_format: Any) -> Any:
    """Return the schema that ``response_format`` asks for; None is free text."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in _FORMATS:
        raise BadInput(f"response_format: type = {kind!r}{nearest(str(kind), _FORMATS)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    # Chat completions nest it, responses do not.
    holder = response_format.get("json_schema", response_format)
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if schema is None:
        raise BadInput("response_format: json_schema needs 'schema', a JSON schema")
    return schema


def _guide(name: str, value: Any) -> _Text:
    if name == "json_object":
        return _json(_ANY_OBJECT, name)
    if name == "json":
        return _json(value, "guided json")
    if name == "choice":
        return _choice(value)
    if not isinstance(value, str) or not value:
        raise BadInput(f"guided {name} = {value!r}: use text that is not empty")
    try:
        if name == "regex":
            return _Text({"regex": value}, f"text: /{lark_regex(value)}/")
        return _Text({"grammar": value}, f"text: %lark {{\n{as_lark(value)}\n}}")
    except Exception as error:  # the library raises nothing more precise
        raise BadInput(f"guided {name}: does not compile: {in_one_line(error)}") from None


def _json(schema: Any, name: str) -> _Text:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{name}: no JSON: {error}") from None
    if not isinstance(schema, Mapping | bool):
        raise BadInput(f"{name}: a JSON schema is an object")
    return _Text({"json_schema": as_json(schema)}, f"text: %json {_schema(schema, name)}")


def _choice(value: Any) -> _Text:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence) or not value:
        raise BadInput("guided choice: give a list of texts")
    for text in value:
        if not isinstance(text, str) or not text:
            raise BadInput(f"guided choice: {text!r}: use texts that are not empty")
    alternatives = " | ".join(as_json(text) for text in value)
    return _Text({"grammar": f"start: {alternatives}"}, f"text: {alternatives}")


def _schema(schema: Any, name: str) -> str:
    try:
        return json.dumps(bounded_blanks(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{name}: no JSON: {error}") from None


def _only(text: _Text, markers: Markers, in_reasoning: bool) -> dict[str, Any]:
    if not in_reasoning:
        return dict(text.option)
    return _grammar(_reasoning(markers, in_reasoning), "text", [text.rule])


# --- grammars in Lark -----------------------------------------------------------------------------


def _grammar(head: Sequence[str], answer: str, rules: Sequence[str]) -> dict[str, Any]:
    """Put a grammar together. ``head`` is what comes before the answer, and its definitions."""
    first, *defined = head or [""]
    lines = [f"start: {first} answer".replace("  ", " "), f"answer: {answer}"]
    # Reasoning and free content are the same terminal.
    return {"grammar": "\n".join(dict.fromkeys([*lines, *defined, *rules])) + "\n"}


def _reasoning(markers: Markers, in_reasoning: bool) -> list[str]:
    """Return a rule for reasoning that the prompt has opened, up to blank lines behind it."""
    if not in_reasoning:
        return []
    if markers.end_think is None:
        raise BadInput(f"this tokenizer has no token {END_THINK}: reasoning could not end")
    return [f"PROSE <[{markers.end_think}]> BREAK", _PROSE, r"BREAK: /\n{0,2}/"]


def _own_reasoning(markers: Markers) -> list[str]:
    """Return a rule for reasoning that the model may begin by itself."""
    if markers.think is None or markers.end_think is None:
        return []
    return [f"(<[{markers.think}]> PROSE <[{markers.end_think}]>)?", _PROSE]


def _calls(markers: Markers, style: CallStyle, tools: Sequence[Tool], parallel: bool) -> list[str]:
    """Return the rules of one call or more, with arguments by each tool's schema."""
    marks = {}
    for name in _CALL_MARKS:
        token = getattr(markers, name)
        if token is None:
            raise BadInput(
                f"this tokenizer has no token {SPELLINGS[name]}: calls of tools can't be demanded"
            )
        marks[name] = f"<[{token}]>"
    between = '"\\n" ' if style == "fenced" else ""
    more = f" ({between}call)*" if parallel else ""
    kind = f'"function" {marks["separator"]} ' if style == "fenced" else ""
    entries = " | ".join(f"tool_{place}" for place in range(len(tools)))
    rules = [
        f"calls: {marks['calls_begin']} call{more} {marks['calls_end']}",
        f"call: {marks['call_begin']} {kind}({entries}) {marks['call_end']}",
    ]
    for place, tool in enumerate(tools):
        rules += _entry(place, tool, style, marks["separator"])
    return rules


def _entry(place: int, tool: Tool, style: CallStyle, separator: str) -> list[str]:
    arguments = f"arguments_{place}"
    if style == "fenced":
        head, tail = as_json(f"{tool.name}\n```json\n"), ' "\\n```"'
    else:
        head, tail = f"{as_json(tool.name)} {separator}", ""
    schema = _schema(tool.parameters, f"tool '{tool.name}'")
    return [f"tool_{place}: {head} {arguments}{tail}", f"{arguments}: %json {schema}"]
