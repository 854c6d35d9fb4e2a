"""How answers are written, whether they are right or not: form, languages, repetition, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ziphius.alignment.rewards.form import think_form
from ziphius.alignment.rewards.language import language_consistency
from ziphius.alignment.rewards.reward import Response

_WORDS = 4  # that repeat together


@dataclass(frozen=True)
class Style:
    """Means over responses: shares, and tokens.

    ``form``: reasoning between think tags, then an answer. ``mixing``: words of the reasoning that
    are of another script than the language asked for. ``repetition``: runs of four words that occur
    a second time. ``length``: tokens. ``unfinished``: responses that were cut.
    """

    form: float
    mixing: float
    repetition: float
    length: float
    unfinished: float


def style_of(responses: Sequence[Response], language: str = "en") -> Style:
    """Measure how responses are written. An empty list is all zeros."""
    consistency = language_consistency(language)
    reasoned = [r for r in responses if r.thinking.strip()]
    return Style(
        form=_mean([think_form(r) for r in responses]),
        mixing=_mean([1 - consistency(r) for r in reasoned]),
        repetition=_mean([repetition(r.text) for r in responses]),
        length=_mean([r.tokens for r in responses]),
        unfinished=_mean([not r.finished for r in responses]),
    )


def repetition(text: str) -> float:
    """Return the share of a text's runs of four words that have occurred before in it."""
    words = text.split()
    runs = [tuple(words[n : n + _WORDS]) for n in range(len(words) - _WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
