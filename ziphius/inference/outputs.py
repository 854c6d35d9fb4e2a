"""What a request has given so far, under the names that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ziphius.inference.logprobs import Scored


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. ``logprobs`` has an entry a token where the request asked for it.

    ``offsets`` are the characters of ``text`` at which each token's own text begins.
    ``finish_reason`` is None while the answer goes on, ``stop``, ``length``, ``abort`` for a
    cancelled request, or ``error``, which ``error`` then tells in one line. ``stop_reason`` is the
    stop string or the id of ``stop_token_ids`` that ended it. ``experts`` are those chosen for the
    prompt's and the answer's tokens but the last, int16 ``[tokens, layers, K]``, where the engine
    keeps them.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[int, ...] = ()
    logprobs: tuple[Scored, ...] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    experts: Tensor | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its ``n`` answers. The first prompt token has no log-probability: None.

    ``num_cached_tokens`` of the prompt were found in the cache. ``drafted`` and ``accepted`` count
    the speculated tokens of all answers.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[Scored | None, ...] | None = None
    num_cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class Delta:
    """What one step has added to one answer: text that can be shown, tokens, log-probabilities.

    ``offsets[i]`` is the character of the whole text at which ``token_ids[i]``'s begins. Text may
    come later than its token; offsets beyond the end of the text mean that end.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[Scored] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    def add(self, later: Delta) -> None:
        """Take in what a later step has added."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.offsets += later.offsets
        self.logprobs += later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.error = later.error
