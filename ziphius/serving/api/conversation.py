"""What every route that converses shares: its fields, and the way from messages to a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ziphius.config.errors import BadInput
from ziphius.inference.params import SamplingParams
from ziphius.inference.tools import check_tools
from ziphius.serving.answers import Answering
from ziphius.serving.api.context import Context
from ziphius.serving.api.documents import REFUSED, NamedTool, Spoken, Tool
from ziphius.serving.api.sampling import FIRST, SamplingFields, Texts
from ziphius.serving.gate import Noted
from ziphius.serving.parse import Parser
from ziphius.serving.served import Prompt, Served
from ziphius.serving.structured import structure

MOST_MESSAGES = 10_000


class ConversationFields(SamplingFields):
    """A conversation, and what the model may answer with."""

    messages: Annotated[list[Spoken], FIRST] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Annotated[list[Tool], FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(None, max_length=32)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    thinking_token_budget: Annotated[int | None, REFUSED] = Field(None, ge=0)
    # Understood, and not done.
    audio: Annotated[dict[str, Any] | None, REFUSED] = None
    modalities: Texts | None = None
    functions: Annotated[list[Any] | None, REFUSED] = None
    function_call: Annotated[Any | None, REFUSED] = None
    web_search_options: Annotated[Any | None, REFUSED] = None
    chat_template: Annotated[str | None, REFUSED] = None

    def require_honourable(self) -> None:
        """Raise BadInput for a field whose wish can't be met."""
        super().require_honourable()
        if self.audio is not None or (self.modalities or ["text"]) != ["text"]:
            raise BadInput("modalities: this model writes text only")
        if self.functions is not None or self.function_call is not None:
            raise BadInput("functions: use tools and tool_choice")
        if self.web_search_options is not None:
            raise BadInput("web_search_options: this server has no search")
        if self.chat_template is not None:
            raise BadInput(
                "chat_template: the server's own is used; render on your side for others"
            )
        if self.thinking_token_budget is not None:
            raise BadInput(
                "thinking_token_budget: is not supported: bound the answer by max_tokens"
            )

    def template_options(self) -> dict[str, Any]:
        """Return what the template is told; an effort of ``none`` asks for no thinking."""
        options = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None and not {"thinking", "enable_thinking"} & set(options):
            options["thinking"] = self.reasoning_effort not in ("none", "minimal")
        return options


@dataclass(frozen=True)
class Turn:
    """A conversation on its way to the engine."""

    prompt: Prompt
    params: SamplingParams
    tools: bool  # whether the answer's calls are to be told from its text

    @classmethod
    async def of(
        cls, context: Context, fields: ConversationFields, *, logprobs: int | None = None
    ) -> Turn:
        """Check a request and render it. Raises BadInput and ApiError."""
        context.require_model(fields.model)
        fields.require_honourable()
        served = context.served
        prompt, structured = await context.aside(
            len(str(fields.messages)) + len(str((fields.tools, fields.response_format))),
            _render,
            served,
            fields,
        )
        prompt = replace(prompt, token_ids=context.kept(prompt.token_ids, fields))
        most = fields.max_completion_tokens or fields.max_tokens
        params = served.params(
            fields.given(),
            # Nothing said: to the end of the context.
            max_tokens=most or served.defaults.get("max_tokens"),
            logprobs=logprobs,
            **structured,
        )
        return cls(prompt, params, bool(fields.tools) and fields.tool_choice != "none")

    async def begin(self, context: Context, fields: ConversationFields, noted: Noted) -> Answering:
        """Give it to the engine."""
        job = context.job(self.prompt.token_ids, self.params, fields, noted)
        return await Answering.begin(context.engine, job, self.parsers(context), noted)

    def parsers(self, context: Context) -> list[Parser | None]:
        """Return what reads each answer."""
        served = context.served
        return [
            served.parser(self.prompt.in_reasoning, tools=self.tools) for _ in range(self.params.n)
        ]


def _render(served: Served, fields: ConversationFields) -> tuple[Prompt, dict[str, Any]]:
    """Return a conversation's prompt, and the parameters that hold its answer to a form."""
    messages = [as_known(message) for message in fields.messages]
    prompt = served.conversation(
        in_call_order(messages),
        tools=fields.tools if fields.tool_choice != "none" else None,
        add_generation_prompt=fields.add_generation_prompt is not False,
        go_on=bool(fields.continue_final_message),
        options=fields.template_options(),
    )
    structured = structure(
        served.markers,
        served.template.calls,
        in_reasoning=prompt.in_reasoning,
        response_format=fields.response_format,
        guided=fields.guided(),
        tools=check_tools(fields.tools),
        tool_choice=fields.tool_choice,
        parallel_tool_calls=fields.parallel_tool_calls,
    )
    return prompt, structured


def as_known(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message under the roles that templates know: a developer is the system."""
    if message.get("role") == "developer":
        return {**message, "role": "system"}
    return message


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
        for made in message.get("tool_calls") or ():
            if made["id"] not in results:
                raise BadInput(f"the call '{made['id'][:100]}' has no result: send one behind it")
            ordered.append(results.pop(made["id"]))
        for unknown in results:
            raise BadInput(f"a result of '{unknown[:100]}': the message before has no such call")
    return ordered


def in_call_order(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with results in the order of their calls, wherever their ids tell it.

    Clients that name no ids, or others, send their results in order.
    """
    ordered: list[dict[str, Any]] = []
    turn: list[dict[str, Any]] = []

    def close() -> None:
        try:
            ordered.extend(results_in_order(turn))
        except (BadInput, KeyError, TypeError, AttributeError):
            ordered.extend(turn)
        turn.clear()

    for message in messages:
        if message.get("role") != "tool":
            close()
        turn.append(message)
    close()
    return ordered


def characters(messages: Sequence[dict[str, Any]]) -> int:
    """Return about how many characters messages have."""
    return sum(len(str(message.get("content", ""))) for message in messages)
