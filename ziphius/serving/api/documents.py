"""Shapes for the documentation: of messages, and of answers. Tests hold the routes to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema


class Error(BaseModel):
    """What went wrong: ``code`` is for programs, ``message`` says what to do."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every error of every route; in a stream it is the last event."""

    type: Literal["error"]
    error: Error


# --- requests -------------------------------------------------------------------------------------

# What a conversation's message may be, for the documentation; templates judge the rest.
_MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [
                {"type": "string"},
                {"type": "null"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    },
                },
            ]
        },
        "reasoning_content": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tool_calls": {"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
        "tool_call_id": {"type": "string"},
    },
}
# A message as requests hold it: any object to us, and what it should be to whoever reads.
Spoken = Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]


def _function(**more: Any) -> dict[str, Any]:
    """Return the shape of what names a function, with ``more`` of its properties."""
    name = more.pop("name", {"type": "string"})
    function = {"type": "object", "required": ["name"], "properties": {"name": name, **more}}
    return {
        "type": "object",
        "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": function},
    }


_TOOL = _function(
    name={"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
    description={"type": "string"},
    parameters={"type": "object"},
    strict={"type": "boolean"},
)
_CHOICE = _function()
_FORMAT: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": ["text", "json_object"]}},
        },
        {
            "type": "object",
            "required": ["type", "json_schema"],
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "required": ["schema"],
                    "properties": {"name": {"type": "string"}, "schema": {"type": "object"}},
                },
            },
        },
    ]
}
# What requests hold as objects of any form, and what they should be to whoever reads.
Tool = Annotated[dict[str, Any], WithJsonSchema(_TOOL)]
NamedTool = Annotated[dict[str, Any], WithJsonSchema(_CHOICE)]
TextFormat = Annotated[dict[str, Any], WithJsonSchema(_FORMAT)]
# Fields that are understood and not honoured: only null is.
REFUSED = WithJsonSchema({"type": "null", "description": "Not supported."})

TALK: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "How deep do whales dive?"},)


def shown(*examples: Mapping[str, Any]) -> ConfigDict:
    """Return the part of a model's configuration that shows examples of it."""
    return ConfigDict(json_schema_extra={"examples": [dict(one) for one in examples]})


# --- the server -----------------------------------------------------------------------------------


class ModelDetails(BaseModel):
    """What the chat page shows of the model."""

    chat: bool
    thinking: str
    tools: bool
    speculation: bool
    parameters: int | None
    dtype: str | None
    defaults: dict[str, Any]


class Model(BaseModel):
    """The model that is served. ``max_model_len`` bounds a prompt with its answer, in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int | None
    ziphius: ModelDetails


class Models(BaseModel):
    """The one model, as a list."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """``status`` is ok where requests are answered."""

    status: Literal["ok", "loading", "stalled", "restarting", "gone"]
    detail: str


class Readiness(BaseModel):
    """``status`` is ready where new requests are taken."""

    status: Literal["ready", "draining", "loading", "stalled", "restarting", "gone"]


class Cleared(BaseModel):
    """The prefixes that nobody used are gone."""

    cleared: bool


class Restarting(BaseModel):
    """The engine is being started again."""

    restarting: bool


# --- tokens ---------------------------------------------------------------------------------------


class Tokens(BaseModel):
    """A text's token ids, and where they were asked for, the text of each."""

    tokens: list[int]
    count: int
    max_model_len: int | None
    token_strs: list[str] = Field(default_factory=list)


class Detokenized(BaseModel):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Special tokens by their text, and the chat template where the checkpoint has one."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    vocab_size: int


# --- answers --------------------------------------------------------------------------------------


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those that an earlier request had computed."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Of the answer's tokens, those of its reasoning; and the drafts that stood or fell."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    """Tokens of a request. The last two are named as DeepSeek names them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int


class Function(BaseModel):
    """The call's tool, and the JSON text of its arguments."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: Function


class Message(BaseModel):
    """An answer. ``reasoning`` and ``reasoning_content`` are the same."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None
    reasoning_content: str | None
    tool_calls: list[ToolCall] = Field(default_factory=list)


class Alternative(BaseModel):
    """A token with its log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative):
    """A token of the answer, and the likeliest that might have stood there."""

    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    """An entry for each completion token, the one that ends the answer included."""

    content: list[TokenLogprob]
    refusal: None


# By token id: logprob, rank and text. The prompt's first token has none.
PromptLogprobs = list[dict[str, dict[str, Any]] | None]
FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One answer to a conversation. ``stop_reason`` is the stop text or token that ended it."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionLogprobs(BaseModel):
    """Four lists with an entry for each token; with ``echo`` the prompt's come first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """How one prompt goes on."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """How prompts go on: ``n`` choices for each, in their order."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
