"""An engine whose answers follow a script, so that a random model thinks, writes and calls tools.

Everything else is as it always is: prompts are computed, tokens come step by step, stop strings,
lengths and log-probabilities work. What a script says is cut into the tokenizer's tokens, marks
included::

    engine = scripted_engine(model, tokenizer)
    engine.say("first thoughts</think>", "an answer", calls(("dive", '{"metres": 3}')))
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tokenizers import Tokenizer

from tests.serving.support import make_tokenizer
from ziphius.data.tokenizer import EOS, EOS_ID
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.errors import RequestError
from ziphius.inference.logits import Row
from ziphius.inference.logprobs import Scored
from ziphius.inference.outputs import Delta
from ziphius.inference.params import SamplingParams
from ziphius.inference.request import Request
from ziphius.inference.sampler import Sampled, Sampler
from ziphius.inference.stop import AnswerText
from ziphius.inference.tools import CallStyle, calls_text
from ziphius.inference.vocabulary import Vocabulary
from ziphius.model.transformer import Transformer
from ziphius.serving.answers import Answering, Event
from ziphius.serving.gate import Noted
from ziphius.serving.link import Job, Stream
from ziphius.serving.parse import Parser

FAILURE = -1  # in a script: the answer breaks off here


class ScriptedEngine(Engine):
    """Says the same in every answer that begins from now on; behind it, what the model says."""

    script: tuple[int, ...] = ()
    prompts: list[list[int]]  # of all requests, the latest last

    def say(self, *parts: str, fails: bool = False) -> None:
        """Set what is said: parts, each cut into tokens alone, and the end of the answer.

        With ``fails`` the answer breaks off in place of its end.
        """
        script = spell(self._tokenizer, parts)
        self.script = (*script[:-1], FAILURE) if fails else script

    def add(self, prompt_ids: Sequence[int], *given: Any, **named: Any) -> Request:
        """Put a request into the queue; its answers follow the script."""
        request = super().add(prompt_ids, *given, **named)
        self.prompts.append(list(prompt_ids))
        for answer in request.answers:
            sampler = answer.verifier.sampler  # type: ignore[attr-defined]
            follow(sampler, self.script)
        return request

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.vocabulary is not None
        return self.vocabulary.tokenizer


def scripted_engine(
    model: Transformer, tokenizer: Tokenizer | None = None, **options: Any
) -> ScriptedEngine:
    """Return such an engine with room for a few requests."""
    given = {"cache_tokens": 16384, "max_running": 4, "page_size": 32, **options}
    engine = ScriptedEngine(
        model, Vocabulary(tokenizer or make_tokenizer()), EngineOptions(**given)
    )
    engine.prompts = []
    return engine


def follow(sampler: Sampler, tokens: Sequence[int]) -> None:
    """Make one answer's sampler choose ``tokens``, and report them as it reports any."""
    free: Callable[..., int] = sampler.token

    def token(logits_V: Row, output: Sequence[int], *, allowed_V: Any = None) -> int:
        if len(output) >= len(tokens):
            return free(logits_V, output, allowed_V=allowed_V)
        if tokens[len(output)] == FAILURE:
            raise RequestError("the script says so")
        return tokens[len(output)]

    def choose(logits_V: Row, output: Sequence[int], *, allowed_V: Any = None) -> Sampled:
        return sampler.report(logits_V, token(logits_V, output, allowed_V=allowed_V))

    sampler.token, sampler.choose = token, choose  # type: ignore[method-assign]
    sampler.plain = lambda length: False  # type: ignore[method-assign]


def spell(tokenizer: Tokenizer, parts: Iterable[str]) -> tuple[int, ...]:
    """Return the tokens of parts, and the end of the answer behind them."""
    ids = [tokenizer.encode(part, add_special_tokens=False).ids for part in (*parts, EOS)]
    return tuple(token for part in ids for token in part)


def calls(*made: tuple[str, str], style: CallStyle = "plain") -> str:
    """Return calls, each a name and its arguments as JSON text, as a model writes them."""
    functions = [{"function": {"name": name, "arguments": text}} for name, text in made]
    return calls_text(functions, style)


def events(
    tokenizer: Tokenizer, tokens: Sequence[int], parser: Parser, cuts: Sequence[int] = ()
) -> list[Event]:
    """Return an answer of these tokens as routes get it, cut behind so many tokens each.

    Without cuts an event is a token. A token's log-probability is minus its place, from 1.
    """
    answering = Answering(cast(Stream, _Canned(_parts(tokenizer, tokens, cuts))), [parser], Noted())

    async def all_of_them() -> list[Event]:
        return [event async for event in answering]

    return asyncio.run(all_of_them())


@dataclass
class _Canned:
    """Stands for an engine's stream."""

    deltas: list[Delta]
    job: Job = field(default_factory=lambda: Job(prompt_ids=[0], params=SamplingParams()))
    end: None = None
    first: None = None  # no time is kept

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for delta in self.deltas:
            yield delta


def _parts(tokenizer: Tokenizer, tokens: Sequence[int], cuts: Sequence[int]) -> list[Delta]:
    params = SamplingParams(max_tokens=None)
    text = AnswerText(Vocabulary(tokenizer), params, frozenset([EOS_ID]))
    parts: list[Delta] = []
    begins = {0, *(cuts or range(len(tokens)))}
    for place, token in enumerate(tokens):
        said = text.push(token)
        scored = Scored(token, -1.0 - place, 1, ())
        finish = text.finish.reason if text.finish is not None else None
        delta = Delta(0, said, [token], [text.offsets[-1]], [scored], finish, None, None)
        if place in begins:
            parts.append(delta)
        else:
            parts[-1].add(delta)
    return parts
