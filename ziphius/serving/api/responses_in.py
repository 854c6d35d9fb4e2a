"""A request of the Responses API: its fields, and the chat that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ziphius.config.errors import BadInput
from ziphius.serving.api.conversation import MOST_MESSAGES, ConversationFields, results_in_order
from ziphius.serving.api.documents import shown
from ziphius.serving.api.sampling import (
    MOST_LOGPROBS,
    Body,
    Objects,
    SamplingFields,
    Text,
    Texts,
    few,
)
from ziphius.serving.api.translated import call, conversation, string, texts

LOGPROBS = "message.output_text.logprobs"
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_MOST_METADATA, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512

Item = Mapping[str, Any]


class ReasoningFields(Body):
    """How much to think. A summary is never made: the reasoning itself is in the answer."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFields(Body):
    """What the text must be."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseFields(SamplingFields):
    """What a response is asked for, beside the fields of every route."""

    model_config = shown({"input": "How deep do whales dive?", "max_output_tokens": 8})

    input: Text | Objects = Field(default_factory=list)
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: Objects | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    include: Texts | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    metadata: Annotated[dict[str, str], few(_MOST_METADATA)] | None = None
    store: bool | None = None
    previous_response_id: str | None = Field(None, max_length=128)
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # They ask nothing of this server: it has no tools of its own, and caches by itself.
    max_tool_calls: int | None = Field(None, ge=1)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: str | None = None
    # Understood, and not done.
    background: bool | None = None
    conversation: Any | None = None
    prompt: Any | None = None
    context_management: list[Any] | None = None
    moderation: Any | None = None

    def require_honourable(self) -> None:
        """Raise BadInput for a field whose wish can't be met."""
        super().require_honourable()
        refused = {
            "background": (self.background, "answers are given while the client waits"),
            "conversation": (self.conversation, "use previous_response_id"),
            "prompt": (self.prompt, "there are no stored prompts: send input and instructions"),
            "context_management": (self.context_management, "send what is to be read"),
            "moderation": (self.moderation, "this server judges no texts"),
            "prompt_logprobs": (self.prompt_logprobs, "use /v1/completions"),
            "return_token_ids": (self.return_token_ids, "use /v1/chat/completions"),
        }
        for name, (value, hint) in refused.items():
            if value is not None and value is not False:
                raise BadInput(f"{name}: is not supported: {hint}")
        if (self.n or 1) != 1:
            raise BadInput("n: a response is one answer")
        if self.truncation == "auto":
            raise BadInput("truncation: 'auto' is not supported: nothing is left out of a prompt")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise BadInput("text.verbosity: is not supported: ask for it in the instructions")
        self._check_metadata()

    def _check_metadata(self) -> None:
        metadata = self.metadata or {}
        for key, value in metadata.items():
            if len(key) > _LONGEST_KEY or len(value) > _LONGEST_VALUE:
                raise BadInput(
                    f"metadata: keys have at most {_LONGEST_KEY} characters, "
                    f"values {_LONGEST_VALUE}"
                )

    @property
    def stores(self) -> bool:
        """Whether the response is to be kept."""
        return self.store is not False

    @property
    def counted_logprobs(self) -> int | None:
        """How many alternatives to report beside each token; None reports nothing."""
        if LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise BadInput(f"top_logprobs: needs include = ['{LOGPROBS}']")
        return None

    def items(self) -> list[dict[str, Any]]:
        """Return the input as items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input

    def as_conversation(self, items: Sequence[Item]) -> ConversationFields:
        """Return the chat that ``items`` and the other fields stand for. Raises BadInput."""
        messages = as_messages(items)
        if not messages:
            raise BadInput("input: give a text, or a list with at least one message")
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        tools, choice = as_tools(self.tools), self.tool_choice
        if isinstance(choice, Mapping):
            tools, choice = _chosen(tools, choice)
        reasoning, text = self.reasoning or ReasoningFields(), self.text or TextFields()
        return conversation(
            self,
            messages=messages,
            tools=tools or None,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=_nested(text.format),
            reasoning_effort=reasoning.effort,
            chat_template_kwargs=self.chat_template_kwargs,
            max_completion_tokens=self.max_output_tokens,
        )


# --- tools ----------------------------------------------------------------------------------------


def as_tools(tools: Sequence[Item] | None) -> list[dict[str, Any]]:
    """Return tools in the shape of chats. Raises BadInput for those that a server would run."""
    return [_tool(tool, f"tools[{place}]") for place, tool in enumerate(tools or ())]


def _tool(tool: Item, where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise BadInput(
            f"{where}: type = {tool.get('type')!r}: only tools of type 'function' can be called"
        )
    function: dict[str, Any] = {"name": string(tool, "name", where)}
    for name in ("description", "parameters", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _chosen(
    tools: list[dict[str, Any]], choice: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], Any]:
    """Return the tools that ``tool_choice`` leaves, and a chat's choice among them.

    What is not allowed is not told to the model.
    """
    kind = choice.get("type")
    if kind == "function":
        name = string(choice, "name", "tool_choice")
        return tools, {"type": "function", "function": {"name": name}}
    if kind != "allowed_tools":
        raise BadInput(f"tool_choice: type = {kind!r}: use 'function' or 'allowed_tools'")
    mode, allowed = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required") or not isinstance(allowed, list):
        raise BadInput("tool_choice: allowed_tools need mode 'auto' or 'required', and 'tools'")
    names = [string(one, "name", "tool_choice.tools[]") for one in allowed]
    for name in names:
        if name not in [tool["function"]["name"] for tool in tools]:
            raise BadInput(f"tool_choice: tool '{name[:100]}' is not among tools")
    return [tool for tool in tools if tool["function"]["name"] in names], mode


def _nested(form: Item | None) -> dict[str, Any] | None:
    """Return ``text.format`` as a chat's ``response_format``."""
    if form is None or form.get("type") != "json_schema":
        return dict(form) if form is not None else None
    held = {name: value for name, value in form.items() if name != "type" and value is not None}
    return {"type": "json_schema", "json_schema": held}


# --- items ----------------------------------------------------------------------------------------


def as_messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return a chat's messages. Reasoning, text and calls that follow each other are one message.

    Raises BadInput for an item that can't be read.
    """
    if len(items) > MOST_MESSAGES:
        raise BadInput(f"input: at most {MOST_MESSAGES} items")
    reader = _Items()
    for place, item in enumerate(items):
        reader.read(item, f"input[{place}]")
    return results_in_order(reader.messages)


class _Items:
    """Reads items one by one."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._thoughts = ""

    def read(self, item: Item, where: str) -> None:
        """Take an item."""
        kind = item.get("type") or "message"
        if kind == "message":
            self._message(item, where)
        elif kind == "reasoning":
            # Of earlier turns templates leave it out; some keep that of the present one.
            content = item.get("content") or item.get("summary") or []
            self._thoughts += "".join(texts(content, _TEXTS, f"{where}.content"))
        elif kind == "function_call":
            names = ("call_id", "name", "arguments")
            made = call(*(string(item, name, where) for name in names))
            self._assistant(open_to_calls=True).setdefault("tool_calls", []).append(made)
        elif kind == "function_call_output":
            output = texts(item.get("output"), _TEXTS, f"{where}.output")
            self._add("tool", "\n\n".join(output), tool_call_id=string(item, "call_id", where))
        elif kind == "item_reference":
            raise BadInput(f"{where}: send the item itself, or use previous_response_id")
        else:
            raise BadInput(f"{where}: type = {kind!r}: items of this type can't be read")

    def _message(self, item: Item, where: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise BadInput(f"{where}: role = {role!r}: use one of {', '.join(_ROLES)}")
        content = "\n\n".join(texts(item.get("content"), _TEXTS, f"{where}.content"))
        if role == "assistant":
            self._assistant(open_to_calls=False)["content"] = content
        else:
            self._add(role, content)

    def _assistant(self, *, open_to_calls: bool) -> dict[str, Any]:
        """Return the assistant's message that an item belongs to: the last one, or a new one."""
        last = self.messages[-1] if self.messages else None
        if open_to_calls and last is not None and last["role"] == "assistant":
            self._thoughts = ""
            return last
        thoughts = self._thoughts
        return self._add("assistant", "", **({"reasoning_content": thoughts} if thoughts else {}))

    def _add(self, role: str, content: str, **more: Any) -> dict[str, Any]:
        self._thoughts = ""
        self.messages.append({"role": role, "content": content, **more})
        return self.messages[-1]
