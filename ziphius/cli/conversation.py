"""A conversation with a model in this process, without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ziphius.config.errors import BadInput
from ziphius.inference.chat import Message
from ziphius.inference.llm import LLM
from ziphius.inference.outputs import Delta
from ziphius.inference.params import SamplingParams
from ziphius.serving.profiles import Profile

Show = Callable[[Delta | None], None]
Stopped = Callable[[], bool]


class ContextFull(BadInput):
    """The conversation has no room for another answer."""


@dataclass(frozen=True)
class Written:
    """What one answer was and cost.

    ``end`` is ``stop``, ``length`` for the limit that was asked for, ``context`` for the end of the
    room, ``stopped`` by its reader, or ``error``. ``first`` is the seconds until its first token.
    """

    text: str
    end: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    first: float
    drafted: int
    accepted: int
    error: str | None = None

    @property
    def speed(self) -> float:
        """Tokens a second after the first."""
        return max(self.tokens - 1, 0) / max(self.seconds - self.first, 1e-9)


class Conversation:
    """Messages in turn, and a model that answers them.

    Nothing is ever left out of a conversation that grows too long: it ends. An answer that is
    stopped or breaks off stays as far as it was written; a message whose answer has no text at all
    is taken back. Each answer of a seeded conversation has a seed of its own.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str = "",
        profile: Profile | None = None,
        **options: Any,
    ) -> None:
        """``options`` are the chat template's; ``profile`` is how the model wants to be asked."""
        self.llm, self.params, self.system, self.options = llm, params, system, options
        self.profile = profile or Profile()
        self.turns: list[Message] = []
        self.written: list[Written] = []
        self.used = 0  # tokens of the turns, as they were last read and written

    @property
    def room(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        engine = self.llm.engine
        # The cache never holds the last token.
        cached = engine.pool.n_pages * engine.options.page_size + 1
        return min(self.llm.model.config.max_position_embeddings, cached)

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint says how to chat with it."""
        return self.llm.chat_template.source is not None

    def clear(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns, self.used = [], 0

    def say(self, text: str, stopped: Stopped, begin: Callable[[str], Show]) -> Written:
        """Answer a message. ``stopped`` says when to stop; ``begin`` gets the prompt and returns
        what is given each step's additions, and None at the end.

        Raises ContextFull, and BadInput for what the chat template refuses; the conversation is
        then what it was.
        """
        return self._answer([*self.turns, {"role": "user", "content": text}], stopped, begin)

    def say_again(self, stopped: Stopped, begin: Callable[[str], Show]) -> Written:
        """Write the last answer anew, as ``say`` does; the old one stays where the new one has no
        text.
        """
        if not self.turns:
            raise BadInput("there is no answer yet to write again")
        return self._answer(self.turns[:-1], stopped, begin)

    def _answer(
        self, turns: list[Message], stopped: Stopped, begin: Callable[[str], Show]
    ) -> Written:
        head = [{"role": "system", "content": self.system}] if self.system else []
        template = self.llm.chat_template
        rendered = self.profile.render(template, [*head, *turns], **self.options)
        text, ids = self.llm.encode(self.llm.encode_rendered(rendered))
        left = self.room - len(ids)
        if left < 1:
            raise ContextFull(
                f"the conversation would have {len(ids)} tokens and there is room for {self.room}: "
                "this message was not added; /clear begins a new conversation"
            )
        wanted = self.params.max_tokens or left
        params = replace(self.params, max_tokens=min(wanted, left), seed=self._seed())
        written = self._write(text or "", ids, params, stopped, begin(text or ""))
        if written.end == "length" and left <= wanted:
            written = replace(written, end="context")
        if written.text:
            self.turns = [*turns, {"role": "assistant", "content": written.text}]
            self.used = len(ids) + written.tokens
        self.written.append(written)
        return written

    def _seed(self) -> int | None:
        return None if self.params.seed is None else self.params.seed + len(self.written)

    def _write(
        self,
        text: str,
        ids: list[int],
        params: SamplingParams,
        stopped: Stopped,
        show: Show,
    ) -> Written:
        engine = self.llm.engine
        began, first, end, error = time.monotonic(), 0.0, "stopped", None
        request = engine.add(ids, params, prompt=text)
        try:
            while not request.finished and not stopped():
                engine.step()
                delta = request.answers[0].pull()
                if delta.token_ids and not first:
                    first = time.monotonic() - began
                show(delta)
                end, error = delta.finish_reason or end, delta.error or error
        finally:
            if not request.finished:
                engine.cancel(request)
        show(None)
        seconds = time.monotonic() - began
        result = request.result()
        answer = result.outputs[0]
        return Written(
            answer.text, end, len(answer.token_ids), len(ids), result.num_cached_tokens,
            seconds, first or seconds, result.drafted, result.accepted, error,
        )  # fmt: skip
