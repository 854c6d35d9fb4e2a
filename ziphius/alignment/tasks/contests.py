"""Preparation of contest problems (AMC, AIME, Odyssey-Math) for rewards by rule.

A prepared problem asks for a whole number, has no options to guess from and is in no benchmark.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ziphius.alignment.tasks.extract import bare_answer, last_boxed, whole_number
from ziphius.alignment.tasks.files import Record, records
from ziphius.alignment.tasks.options import (
    asks_about_options,
    letter_of,
    options_of,
    plain_value,
    split_options,
)
from ziphius.checkpoint.files import write_atomic
from ziphius.config.errors import BadInput
from ziphius.data.clean import is_unicode
from ziphius.data.deduplicate import words_of

NO_QUESTION = "no question"
NO_ANSWER = "no answer"
NO_SUCH_OPTION = "a letter without its option"
NEEDS_OPTIONS = "asks about its options"
NOT_WHOLE = "answer is no whole number"
COPY = "copy of another problem"
IN_BENCHMARK = "in a benchmark"

# Of a problem's sequences of so many words, this share in a benchmark makes it one of it.
_WORDS = 8
_SHARE = 0.5


@dataclass(frozen=True)
class Prepared:
    """What a preparation read, kept and dropped: ``dropped`` counts by reason."""

    read: int
    kept: int
    dropped: Mapping[str, int]


def prepare_contests(
    sources: Sequence[Path], target: Path, benchmarks: Sequence[Path] = ()
) -> Prepared:
    """Write the usable problems of some JSONL files as one: ``question``, ``answer``, ``source``.

    A source has ``problem`` or ``question`` and ``answer``, ``label`` or a boxed answer in
    ``solution``; options stand in ``options`` or ``choices`` or in the text. A line may also map
    one name to such a record, as Odyssey-Math's do. Near copies of what the benchmark files ask
    (``problem``, ``question`` or ``prompt``) are dropped. Files and lines keep their order.

    Raises BadInput for a file that cannot be read or is no JSONL, and where nothing is left.
    """
    asked = _Asked(_questions(benchmarks))
    seen: set[str] = set()
    lines, dropped, read = [], Counter[str](), 0
    for path in sources:
        for _, record in records(path):
            read += 1
            usable = _usable(_unwrapped(record), asked, seen)
            if isinstance(usable, str):
                dropped[usable] += 1
                continue
            question, answer = usable
            kept = {"question": question, "answer": str(answer), "source": path.name}
            lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
    if not lines:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise BadInput(f"{target}: no problem is left to write: {reasons or 'the files are empty'}")
    write_atomic(target, "".join(lines).encode())
    return Prepared(read, len(lines), MappingProxyType(dict(dropped)))


def _usable(record: Record, asked: _Asked, seen: set[str]) -> tuple[str, int] | str:
    """Return a problem's question and answer, or why it is dropped."""
    text = _question_of(record)
    if text is None:
        return NO_QUESTION
    question, options = split_options(text)
    options = options or options_of(record.get("options", record.get("choices")))
    if not question:
        return NO_QUESTION
    given = _answer_of(record)
    if given is None:
        return NO_ANSWER
    if letter := letter_of(given):
        if letter not in options:
            return NO_SUCH_OPTION
        given = options[letter]
    if options and asks_about_options(question):
        return NEEDS_OPTIONS
    answer = whole_number(bare_answer(plain_value(given)))
    if answer is None:
        return NOT_WHOLE
    if asked.has(question):
        return IN_BENCHMARK
    if (normal := _normal(question)) in seen:
        return COPY
    seen.add(normal)
    return question, answer


def _unwrapped(record: Record) -> Record:
    """Return the record in ``{"Problem_1": {...}}``, and any other as it is."""
    if len(record) == 1 and isinstance(inner := next(iter(record.values())), dict):
        return inner
    return record


def _question_of(record: Record) -> str | None:
    for field in ("problem", "question", "prompt"):
        if isinstance(value := record.get(field), str) and is_unicode(value) and value.strip():
            return value
    return None


def _answer_of(record: Record) -> str | None:
    for field in ("answer", "label"):
        value = record.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, str) and value.strip():
            return value
    solution = record.get("solution")
    return last_boxed(solution) if isinstance(solution, str) else None


def _questions(paths: Iterable[Path]) -> Iterable[str]:
    for path in paths:
        for where, record in records(path):
            text = _question_of(_unwrapped(record))
            if text is None:
                raise BadInput(f"{where}: has no 'problem', 'question' or 'prompt': repair it")
            yield split_options(text)[0]


class _Asked:
    """What benchmarks ask: whole questions, and sequences of ``_WORDS`` words."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._whole: set[str] = set()
        self._sequences: set[str] = set()
        for question in questions:
            self._whole.add(_normal(question))
            self._sequences.update(_sequences(question))

    def has(self, question: str) -> bool:
        """Say whether a question is one of them, or mostly made of their sequences."""
        if _normal(question) in self._whole:
            return True
        sequences = _sequences(question)
        shared = sum(sequence in self._sequences for sequence in sequences)
        return bool(sequences) and shared >= _SHARE * len(sequences)


def _sequences(text: str) -> list[str]:
    words = words_of(text.lower())
    return [" ".join(words[i : i + _WORDS]) for i in range(len(words) - _WORDS + 1)]


def _normal(text: str) -> str:
    """Return the words alone, and the signs where there are no words: case means nothing."""
    return " ".join(words_of(text.lower())) or text
