"""Answers as an engine gives them, and every way to cut them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from ziphius.data.tokenizer import EOS_ID
from ziphius.inference.params import SamplingParams
from ziphius.inference.stop import AnswerText, Finish
from ziphius.inference.vocabulary import Vocabulary
from ziphius.serving.parse import Markers, Parsed, Parser, Piece, collect


class Step(NamedTuple):
    """What one push gives a parser."""

    text: str
    tokens: list[int]
    offsets: list[int]


class Read(NamedTuple):
    """What a parser made of an answer."""

    parsed: Parsed
    reasoning_tokens: int
    called: bool


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def answer(vocabulary: Vocabulary, tokens: Sequence[int], **options: Any) -> list[Step]:
    """Return a step a token, as the engine would give them; an end that no token says is there."""
    params = SamplingParams(max_tokens=None, **options)
    text, steps = AnswerText(vocabulary, params, [EOS_ID]), []
    for token in tokens:
        shown = text.push(token)
        steps.append(Step(shown, [token], [text.offsets[-1]]))
        if text.finish is not None:
            return steps
    return [*steps, Step(text.end(Finish("length")), [], [])]


def cut(steps: Sequence[Step], chance: random.Random) -> list[Step]:
    """Put steps together, and let text come later than it could, as ``chance`` has it."""
    late, pieces, now = "", [], Step("", [], [])
    together, lag = chance.choice([0.1, 0.5, 0.9]), chance.choice([0, 0.5, 1])
    for step in steps:
        late += step.text
        held = chance.randrange(len(late) + 1) if chance.random() < lag else 0
        given, late = late[: len(late) - held], late[len(late) - held :]
        now = Step(now.text + given, now.tokens + step.tokens, now.offsets + step.offsets)
        if chance.random() > together:
            pieces.append(now)
            now = Step("", [], [])
    return [*pieces, now, Step(late, [], [])]


def read(markers: Markers, steps: Iterable[Step], **how: Any) -> Read:
    """Parse an answer; ``in_reasoning`` is false unless it is given."""
    pieces, parser = stream(markers, steps, **how)
    return Read(collect(p for step in pieces for p in step), parser.reasoning_tokens, parser.called)


def stream(markers: Markers, steps: Iterable[Step], **how: Any) -> tuple[list[list[Piece]], Parser]:
    """Return the pieces of every step, those of the end last."""
    parser = Parser(markers, **{"in_reasoning": False, **how})
    pieces = [parser.push(*step) for step in steps]
    return [*pieces, parser.finish()], parser
