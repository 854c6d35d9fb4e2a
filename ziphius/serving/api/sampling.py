"""The fields by which every route that answers is asked: OpenAI's, and what vLLM's users add."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ziphius.config.errors import BadInput
from ziphius.inference.params import SamplingParams
from ziphius.serving.api.documents import REFUSED, TextFormat

Text = Annotated[str, Field(max_length=8 << 20)]
# A list stops being read at its first wrong item: an error for each of a million would hold up
# everybody's streams.
FIRST = Field(fail_fast=True)
Texts = Annotated[list[Text], FIRST]
Ids = Annotated[list[int], FIRST]
IdLists = Annotated[list[Ids], FIRST]
Objects = Annotated[list[dict[str, Any]], FIRST]
# Looked for after every token of an answer.
Short = Annotated[str, Field(max_length=1000)]
Watched = Annotated[list[Short], Field(fail_fast=True, max_length=64)]
MOST_LOGPROBS = 20
MOST_BIASES = 4096
# Bounds far beyond any use, within which logits stay finite.
Bias = Annotated[float, Field(ge=-1e4, le=1e4)]
LEAST_REPETITION_PENALTY = 0.01


class Body(BaseModel):
    """A request's body. Types are taken as they are; unknown fields are ignored and told."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    def ignored(self) -> list[str]:
        """Name the fields that nothing here understands."""
        return sorted(self.model_extra or ())


def few(most: int) -> BeforeValidator:
    """Refuse an object of more than ``most`` fields before each of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"at most {most} fields")
        return value

    return BeforeValidator(check)


class StreamOptions(Body):
    """``include_usage`` asks for a last chunk with the usage, the other for it in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GuideFields(Body):
    """What the answer's text must be: OpenAI's field, and vLLM's older and newer ones."""

    response_format: TextFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None

    def guided(self) -> dict[str, Any]:
        """Return vLLM's options that are given."""
        options = {name: getattr(self, name) for name in GuideFields.model_fields}
        del options["response_format"]
        given = {name: value for name, value in options.items() if value is not None}
        return {**(given.pop("structured_outputs", None) or {}), **given}


class SamplingFields(GuideFields):
    """What chooses tokens and ends an answer. What is not given, the server's defaults decide."""

    model: str | None = Field(None, max_length=512)
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=LEAST_REPETITION_PENALTY, le=10)
    seed: int | None = None
    stop: Short | Watched | None = None
    stop_token_ids: Ids | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    logit_bias: Annotated[dict[str, Bias], few(MOST_BIASES)] | None = None
    allowed_token_ids: Ids | None = None
    bad_words: Watched | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(None, ge=-1000, le=1000)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    return_token_ids: bool | None = None
    # Keep the prompt's last tokens only; -1: as many as the context has room for.
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    user: str | None = None
    # Understood, and not done: refused rather than passed over.
    best_of: int | None = None
    use_beam_search: Annotated[bool | None, REFUSED] = None
    kv_transfer_params: Annotated[dict[str, Any] | None, REFUSED] = None

    def require_honourable(self) -> None:
        """Raise BadInput for a field whose wish can't be met."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise BadInput("best_of: is not supported: ask for n answers and choose among them")
        if self.use_beam_search:
            raise BadInput("use_beam_search: is not supported: answers are sampled")
        if self.kv_transfer_params:
            raise BadInput("kv_transfer_params: this server does prefill and decode in one place")
        if self.stream_options is not None and not self.stream:
            raise BadInput("stream_options: is for streams: set stream to true")
        if self.prompt_logprobs is not None and self.stream:
            raise BadInput("prompt_logprobs: are known at the end: set stream to false")

    @property
    def streams(self) -> bool:
        """Whether the answer is wanted piece by piece."""
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        """Whether a last chunk with the usage is wanted."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        """Whether every chunk is to have the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def given(self) -> dict[str, Any]:
        """Return the sampling options that the request names."""
        given = {
            name: value
            for name in _NAMES
            if name in type(self).model_fields and (value := getattr(self, name)) is not None
        }
        if self.seed is not None:  # any integer is a seed to OpenAI's clients
            given["seed"] = self.seed % 2**63
        return given


_NAMES = tuple(
    known.name
    for known in dataclass_fields(SamplingParams)
    if known.name not in ("max_tokens", "logprobs", "json_schema", "regex", "grammar", "detokenize")
)
