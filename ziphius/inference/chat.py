"""Messages to a prompt: by the checkpoint's own template, or in a built-in format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ziphius.checkpoint.folder import read_json_object
from ziphius.config.errors import BadInput, in_one_line
from ziphius.config.table import nearest
from ziphius.data.tokenizer import CONFIG_FILE
from ziphius.inference.formats import FORMATS, Format, Thinking, opens_reasoning
from ziphius.inference.tools import SEPARATOR, CallStyle, as_json, check_tools, with_tools

TEMPLATE_FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant", "tool")
DEFAULT_FORMAT = "v3"
_THINKING_NAMES = ("thinking", "enable_thinking")

Message = Mapping[str, Any]


class ChatTemplate:
    """Renders a conversation as text. ``source`` is Jinja as Hugging Face checkpoints have it.

    ``tokens`` are the special tokens that it may name, ``bos_token`` and so on. Without a source
    the format is the built-in one of that name. A template runs in a sandbox: it sees what it is
    given and nothing else.
    """

    def __init__(
        self,
        source: str | None = None,
        tokens: Mapping[str, str] | None = None,
        *,
        format: str = DEFAULT_FORMAT,
    ) -> None:
        """Raises BadInput for a format that is not known."""
        if format not in FORMATS:
            raise BadInput(f"chat format '{format}'{nearest(format, FORMATS)}")
        self.source, self.tokens = source, dict(tokens or {})
        self.format: Format | None = FORMATS[format] if source is None else None

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        enable_thinking: bool | None = None,
        **options: Any,
    ) -> str:
        """Return the conversation's text, open for the assistant's next turn if asked for.

        ``tools`` are OpenAI's; a template that does not know them has them in the first system
        message, in our words. ``thinking`` asks for reasoning where it is optional and has two
        names, as templates do; None is the template's default. ``options`` are what else the
        template knows. Raises BadInput for messages and tools that are none, and for what the
        template refuses.
        """
        checked, thinks = check_messages(messages), _one_switch(thinking, enable_thinking)
        if tools and not self.knows_tools:
            checked = with_tools(checked, check_tools(tools), self.calls)
        try:
            if self.format is not None:
                return self.format.render(
                    checked, add_generation_prompt=add_generation_prompt, thinking=thinks
                )
            given = {**self.tokens, **options, "add_generation_prompt": add_generation_prompt}
            given |= {"tools": list(tools)} if tools else {}
            given |= {} if thinks is None else dict.fromkeys(_THINKING_NAMES, thinks)
            return self._template.render({**given, "messages": checked})
        except BadInput:
            raise
        except TemplateError as error:
            raise BadInput(f"chat template: {in_one_line(error)}") from None
        except Exception as error:  # a template may do anything with messages it doesn't expect
            raise BadInput(f"chat template: {type(error).__name__}: {in_one_line(error)}") from None

    @cached_property
    def thinking(self) -> Thinking:
        """Whether prompts open the model's reasoning, as the end of a prompt shows."""
        hello = [{"role": "user", "content": "Hello"}]
        opened = {opens_reasoning(self.render(hello, thinking=asked)) for asked in (True, False)}
        if len(opened) == 2:
            return "optional"
        return "always" if opened == {True} else "never"

    @cached_property
    def calls(self) -> CallStyle:
        """How an assistant's calls are spelled, as a conversation with one shows.

        A template that cannot render a call, or leaves it out, counts as one of V3.
        """
        if self.format is not None:
            return self.format.calls
        call = {"id": "0", "type": "function", "function": {"name": "NAME", "arguments": "{}"}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            text = self.render([{"role": "user", "content": "Hello"}, said])
        except BadInput:
            return "fenced"
        return "plain" if f"NAME{SEPARATOR}" in text else "fenced"

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template itself tells the model of tools that it is given."""
        if self.source is None:
            return False
        return "tools" in meta.find_undeclared_variables(self._parsed)

    @property
    def _parsed(self) -> nodes.Template:
        try:
            return _environment().parse(self.source or "")
        except TemplateError as error:
            raise BadInput(f"chat template: {in_one_line(error)}") from None

    @cached_property
    def _template(self) -> Template:
        assert self.source is not None, "a built-in format is no template"
        return _environment().from_string(self.source)


def read_chat_template(folder: Path, format: str = DEFAULT_FORMAT) -> ChatTemplate:
    """Read a checkpoint's template: its own file, or the one in ``tokenizer_config.json``.

    One without either has the built-in ``format``. Raises BadInput for files that can't be read.
    """
    config = read_json_object(folder / CONFIG_FILE)
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    file = folder / TEMPLATE_FILE
    if not file.is_file():
        return ChatTemplate(_default(config.get("chat_template")), tokens, format=format)
    try:
        return ChatTemplate(file.read_text("utf-8"), tokens, format=format)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: cannot be read: {in_one_line(error)}") from None


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


def _default(template: Any) -> str | None:
    """Return the template to use where a config has several by name."""
    if isinstance(template, list):
        named = {entry.get("name"): entry for entry in template if isinstance(entry, Mapping)}
        template = named.get("default", {}).get("template")
    return template if isinstance(template, str) else None


def _one_switch(thinking: Any, enable_thinking: Any) -> bool | None:
    given = [value for value in (thinking, enable_thinking) if value is not None]
    if any(not isinstance(value, bool) for value in given):
        raise BadInput("thinking: use true or false")
    if len(set(given)) > 1:
        raise BadInput("thinking and enable_thinking are one switch: give one of them")
    return given[0] if given else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


def _refuse(message: str) -> NoReturn:
    raise BadInput(f"chat template: {in_one_line(message)}")


def _now(form: str) -> str:
    return datetime.now().strftime(form)
