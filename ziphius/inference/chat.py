"""Messages to a prompt: by the checkpoint's own template, or in V3's format (facts 8.10)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ziphius.config.errors import BadInput
from ziphius.config.table import nearest
from ziphius.data.tokenizer import (
    ASSISTANT,
    BOS,
    CONFIG_FILE,
    END_THINK,
    EOS,
    TOOL_TOKENS,
    USER,
)

TEMPLATE_FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant", "tool")
_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END = TOOL_TOKENS[:4]
_OUTPUTS_BEGIN, _OUTPUTS_END, _OUTPUT_BEGIN, _OUTPUT_END, _SEPARATOR = TOOL_TOKENS[4:]

Message = Mapping[str, Any]


class ChatTemplate:
    """Renders a conversation as text. ``source`` is Jinja as Hugging Face checkpoints have it.

    ``tokens`` are the special tokens that it may name, ``bos_token`` and so on. Without a source
    the format is V3's. A template runs in a sandbox: it sees what it is given and nothing else.
    """

    def __init__(self, source: str | None = None, tokens: Mapping[str, str] | None = None) -> None:
        self.source, self.tokens = source, dict(tokens or {})

    def render(
        self, messages: Sequence[Message], /, *, add_generation_prompt: bool = True, **options: Any
    ) -> str:
        """Return the conversation's text, open for the assistant's next turn if asked for.

        ``options`` are what else the template knows, such as ``thinking``. Raises BadInput for
        messages that are none, and for what the template refuses.
        """
        checked = check_messages(messages)
        try:
            if self.source is None:
                return v3_format(checked, add_generation_prompt=add_generation_prompt)
            given = {**self.tokens, **options, "add_generation_prompt": add_generation_prompt}
            return self._template.render({**given, "messages": checked})
        except BadInput:
            raise
        except TemplateError as error:
            raise BadInput(f"chat template: {_line(error)}") from None
        except Exception as error:  # a template may do anything with messages it doesn't expect
            raise BadInput(f"chat template: {type(error).__name__}: {_line(error)}") from None

    @cached_property
    def _template(self) -> Template:
        assert self.source is not None, "V3's own format is no template"
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        return environment.from_string(self.source)


def read_chat_template(folder: Path) -> ChatTemplate:
    """Read a checkpoint's template: its own file, or the one in ``tokenizer_config.json``.

    Raises BadInput for files that can't be read.
    """
    config = _read_config(folder / CONFIG_FILE)
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    file = folder / TEMPLATE_FILE
    if not file.is_file():
        return ChatTemplate(_default(config.get("chat_template")), tokens)
    try:
        return ChatTemplate(file.read_text("utf-8"), tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: cannot be read: {_line(error)}") from None


def v3_format(messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """Render as DeepSeek-V3 does: system texts first, then turns without anything between them.

    An assistant's turn ends with the end of sentence; of its reasoning only what follows stays.
    """
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    parts, answering_tools = [BOS, system], False
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            parts += [] if answering_tools else [_OUTPUTS_BEGIN]
            parts += [_OUTPUT_BEGIN, content, _OUTPUT_END]
            answering_tools = True
        elif role != "system":
            if answering_tools:
                parts.append(_OUTPUTS_END)
            if role == "user":
                parts += [USER, content]
            else:
                said = (content or "").split(END_THINK)[-1]
                parts += [] if answering_tools else [ASSISTANT]
                parts += [said, _calls(message.get("tool_calls", ())), EOS]
            answering_tools = False
    if answering_tools:
        parts.append(_OUTPUTS_END)
    elif add_generation_prompt:
        parts.append(ASSISTANT)
    return "".join(parts)


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages with their text as one string each.

    Raises BadInput for what is no list of messages, a role that is not known, and a message without
    text; an assistant may call tools instead.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise BadInput("messages: give a list of objects with 'role' and 'content'")
    if not messages:
        raise BadInput("messages is empty: give at least one")
    return [_checked(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _checked(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadInput(f"{where}: give an object with 'role' and 'content'")
    role = message.get("role")
    if role not in ROLES:
        raise BadInput(f"{where}: role = {role!r}{nearest(str(role), ROLES)}")
    # Templates ask whether these are there at all.
    kept = {key: value for key, value in message.items() if key != "tool_calls" or value}
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(_part(part, where) for part in content)
    if content is None and not (role == "assistant" and "tool_calls" in kept):
        raise BadInput(f"{where}: a message of role {role} needs 'content'")
    if content is not None and not isinstance(content, str):
        raise BadInput(f"{where}: content = {content!r}: give text")
    return {**kept, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise BadInput(f"{where}: content: only parts of type 'text' can be read")


def _calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Render the tools that an assistant calls."""
    parts = []
    for call in calls:
        function = call["function"]
        given = function["arguments"]
        text = given if isinstance(given, str) else _to_json(given)
        kind = call.get("type", "function")
        head = f"{_CALL_BEGIN}{kind}{_SEPARATOR}{function['name']}"
        parts.append(f"{head}\n```json\n{text}\n```{_CALL_END}")
    return _CALLS_BEGIN + "\n".join(parts) + _CALLS_END if parts else ""


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {_line(error)}") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path}: holds no JSON object: restore the checkpoint's own")
    return config


def _default(template: Any) -> str | None:
    """Return the template to use where a config has several by name."""
    if isinstance(template, list):
        named = {entry.get("name"): entry for entry in template if isinstance(entry, Mapping)}
        template = named.get("default", {}).get("template")
    return template if isinstance(template, str) else None


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise BadInput(f"chat template: {_line(message)}")


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _line(error: object) -> str:
    return " ".join(str(error).split()) or "no message"
