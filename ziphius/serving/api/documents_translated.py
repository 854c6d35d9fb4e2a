"""Shapes for the documentation: of the Responses API, and of Anthropic's Messages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from ziphius.serving.api.documents import TokenLogprob

# --- messages -------------------------------------------------------------------------------------


class TextBlock(BaseModel):
    """What the model says."""

    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    """What it thinks before. Nothing is signed."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(BaseModel):
    """A call of a tool; ``input`` follows its schema where that was asked for."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(BaseModel):
    """Of the answer's tokens, those of its thoughts."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Tokens of a request; those that an earlier one had computed count apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class AnsweredMessage(BaseModel):
    """An answer in blocks."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class CountedTokens(BaseModel):
    """The tokens of a conversation."""

    input_tokens: int


# --- responses ------------------------------------------------------------------------------------


class OutputText(BaseModel):
    """A text, with its log-probabilities where they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class ReasoningText(BaseModel):
    """A thought."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(BaseModel):
    """What the model says."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class OutputReasoning(BaseModel):
    """What it thinks before; it is never summed up."""

    type: Literal["reasoning"]
    id: str
    status: Literal["completed", "incomplete"]
    summary: list[Any]
    content: list[ReasoningText]


class OutputCall(BaseModel):
    """A call of a tool."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["completed", "incomplete"]


class InputTokensDetails(BaseModel):
    """Of the prompt's tokens, those that an earlier request had computed."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """Of the answer's tokens, those of its reasoning."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Answered(BaseModel):
    """A response: what came of it, and what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    background: Literal[False]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputReasoning | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage
    user: str | None


class Deleted(BaseModel):
    """A stored response is forgotten."""

    id: str
    object: Literal["response.deleted"]
    deleted: Literal[True]
