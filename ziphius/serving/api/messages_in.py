"""A request of the Messages API: its fields, and the chat that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ziphius.config.errors import BadInput
from ziphius.serving.api.conversation import MOST_MESSAGES, ConversationFields, results_in_order
from ziphius.serving.api.documents import TALK, shown
from ziphius.serving.api.sampling import Body, Objects, SamplingFields, Text, Watched
from ziphius.serving.api.translated import call, conversation, string, texts

# What stands where a model's arguments are no JSON object, as Anthropic advises clients to do.
INVALID = "INVALID_JSON"
_TEXT = ("text",)
_ROLES = ("user", "assistant", "system")

Block = Mapping[str, Any]


class ThinkingFields(Body):
    """Whether to think. The budget bounds nothing by itself: ``max_tokens`` bounds all."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class ChoiceFields(Body):
    """Whether tools are called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def as_chat(self) -> str | dict[str, Any]:
        """Return a chat's ``tool_choice``. Raises BadInput for a tool without a name."""
        if self.type != "tool":
            return {"any": "required"}.get(self.type, self.type)
        if self.name is None:
            raise BadInput("tool_choice: type 'tool' needs the tool's name")
        return {"type": "function", "function": {"name": self.name}}


class OutputFields(Body):
    """What the text must be. How much effort is made is the model's own affair."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountFields(SamplingFields):
    """A conversation whose tokens can be counted."""

    model_config = shown({"messages": TALK})

    messages: Objects = Field(min_length=1, max_length=MOST_MESSAGES)
    system: Text | Objects | None = None
    tools: Objects | None = None
    tool_choice: ChoiceFields | None = None
    thinking: ThinkingFields | None = None
    output_config: OutputFields | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Prefixes are cached without being asked to.
    cache_control: dict[str, Any] | None = None
    # Understood, and not done.
    container: Any | None = None
    context_management: Any | None = None
    mcp_servers: list[Any] | None = None

    def require_honourable(self) -> None:
        """Raise BadInput for a field whose wish can't be met."""
        super().require_honourable()
        for name in ("container", "context_management", "mcp_servers", "prompt_logprobs"):
            if getattr(self, name):
                raise BadInput(f"{name}: is not supported by this route")
        if (self.n or 1) != 1 or self.return_token_ids:
            raise BadInput("n and return_token_ids: use /v1/chat/completions")

    def as_conversation(self, **more: Any) -> ConversationFields:
        """Return the chat that this request stands for. Raises BadInput."""
        messages = as_messages(self.messages)
        if self.system:
            system = "\n\n".join(texts(self.system, _TEXT, "system"))
            messages.insert(0, {"role": "system", "content": system})
        options = dict(self.chat_template_kwargs or {})
        if self.thinking is not None:
            options["thinking"] = self.thinking.type != "disabled"
        choice = self.tool_choice
        alone = choice is not None and bool(choice.disable_parallel_tool_use)
        return conversation(
            self,
            messages=messages,
            tools=[_tool(tool, f"tools[{place}]") for place, tool in enumerate(self.tools or ())]
            or None,
            tool_choice=choice.as_chat() if choice is not None else None,
            parallel_tool_calls=False if alone else None,
            response_format=self._format(),
            chat_template_kwargs=options or None,
            continue_final_message=messages[-1]["role"] == "assistant" or None,
            **more,
        )

    def _format(self) -> dict[str, Any] | None:
        form = self.output_config.format if self.output_config is not None else None
        if form is None:
            return None
        if form.get("type") != "json_schema":
            raise BadInput(f"output_config.format: type = {form.get('type')!r}: use 'json_schema'")
        held = {"name": "answer", "schema": form.get("schema")}
        return {"type": "json_schema", "json_schema": held}


class MessageFields(CountFields):
    """What a message is asked for."""

    model_config = shown({"messages": TALK, "max_tokens": 8})

    max_tokens: int = Field(ge=1)
    stop_sequences: Watched | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    @property
    def eager(self) -> frozenset[str]:
        """Names of the tools whose arguments are wanted as they come, valid or not."""
        return frozenset(
            tool["name"] for tool in self.tools or () if tool.get("eager_input_streaming")
        )

    def as_conversation(self, **more: Any) -> ConversationFields:
        """Return the chat that this request stands for. Raises BadInput."""
        ends = self.stop_sequences or self.stop
        return super().as_conversation(
            max_tokens=self.max_tokens, **({"stop": ends} if ends else {})
        )


def _tool(tool: Block, where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise BadInput(f"{where}: type = {tool['type']!r}: this server has no tools of its own")
    function = {"name": string(tool, "name", where), "parameters": tool.get("input_schema")}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    if not isinstance(function["parameters"], Mapping):
        raise BadInput(f"{where}.input_schema: give a JSON schema, an object")
    return {"type": "function", "function": function}


# --- messages -------------------------------------------------------------------------------------


def as_messages(messages: Sequence[Block]) -> list[dict[str, Any]]:
    """Return a chat's messages. A user's results of tools come first, then what the user says.

    Raises BadInput for a block that can't be read.
    """
    read: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        where, role = f"messages[{place}]", message.get("role")
        if role not in _ROLES:
            raise BadInput(f"{where}: role = {role!r}: use one of {', '.join(_ROLES)}")
        blocks = _blocks(message.get("content"), f"{where}.content")
        if role == "assistant":
            read.append(_assistant(blocks, f"{where}.content"))
        else:
            read += _user(role, blocks, f"{where}.content")
    return results_in_order(read)


def _blocks(content: Any, where: str) -> list[Block]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise BadInput(f"{where}: give a string, or a list of blocks")
    return content


def _user(role: str, blocks: Sequence[Block], where: str) -> list[dict[str, Any]]:
    results, said = [], []
    for place, block in enumerate(blocks):
        if block.get("type") == "tool_result":
            results.append(_result(block, f"{where}[{place}]"))
        else:
            said += texts([block], _TEXT, where)
    told = [{"role": role, "content": "\n\n".join(said)}] if said or not results else []
    return [*results, *told]


def _result(block: Block, where: str) -> dict[str, Any]:
    content = block.get("content")
    text = "" if content is None else "\n\n".join(texts(content, _TEXT, f"{where}.content"))
    if block.get("is_error"):
        text = f"Error: {text}"  # templates have no other place for it
    return {"role": "tool", "content": text, "tool_call_id": string(block, "tool_use_id", where)}


def _assistant(blocks: Sequence[Block], where: str) -> dict[str, Any]:
    said, thoughts, calls = [], [], []
    for place, block in enumerate(blocks):
        kind, here = block.get("type"), f"{where}[{place}]"
        if kind == "text":
            said.append(string(block, "text", here))
        elif kind == "thinking":
            thoughts.append(string(block, "thinking", here))
        elif kind == "tool_use":
            made = (string(block, "id", here), string(block, "name", here))
            calls.append(call(*made, _arguments(block.get("input"), here)))
        elif kind != "redacted_thinking":
            raise BadInput(f"{here}: type = {kind!r}: blocks of this type can't be read")
    message: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(said)}
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _arguments(given: Any, where: str) -> str:
    """Return arguments as the model wrote them."""
    if not isinstance(given, Mapping):
        raise BadInput(f"{where}.input: give an object")
    if given.keys() == {INVALID} and isinstance(given[INVALID], str):
        return str(given[INVALID])
    return json.dumps(given, ensure_ascii=False)
