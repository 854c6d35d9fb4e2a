"""Needle in a haystack: a fact somewhere in a long real text, asked for at its end (facts 7.4).

A fact is a sentence, "Remember Belon K D W R."; the question is its beginning, so that a base
model answers it too. Other facts lie in the same haystack: whoever repeats just any code is wrong.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.inference.params import SamplingParams

Side = Literal["train", "test"]
Line = TypeVar("Line", str, list[int])
Progress = Callable[[int, int], None]

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
CODE_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CODE_LENGTH = 4
# One name and one code in so many are the test's; training never sees them.
_TEST_EVERY = 8
# Facts are longer by a token or two than any of so many that have been looked at.
_SEEN_FACTS, _SPARE_TOKENS = 256, 2
_CODE = re.compile(r"\s*([A-Z](?: [A-Z])*)(?![A-Za-z])")


@dataclass(frozen=True)
class Fact:
    """Whose code is which: ``code`` is letters with blanks between them."""

    name: str
    code: str

    @property
    def sentence(self) -> str:
        """The fact as a line."""
        return f"{self.question} {self.code}.\n"

    @property
    def question(self) -> str:
        """The sentence up to the code."""
        return f"Remember {self.name}"

    def answered_by(self, text: str) -> bool:
        """Say whether a continuation of the question is the whole code, and nothing more."""
        found = _CODE.match(text)
        return found is not None and found[1] == self.code


def draw_facts(count: int, side: Side, rng: random.Random) -> list[Fact]:
    """Draw facts with different names and codes.

    No name and no code of the test's facts is ever one of training's, whatever the generator.
    """
    names, codes = draw_names(side, rng), _codes(side, rng)
    return [
        Fact(*pair) for pair in zip(_distinct(names, count), _distinct(codes, count), strict=True)
    ]


def side_of(text: str) -> Side:
    """Return for what a name or a code is used."""
    return "test" if zlib.crc32(text.encode()) % _TEST_EVERY == 0 else "train"


def draw_names(side: Side, rng: random.Random) -> Iterator[str]:
    """Yield names without end."""
    while True:
        parts = (_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS, _CONSONANTS)
        name = "".join(map(rng.choice, parts)).capitalize()
        if side_of(name) == side:
            yield name


def _codes(side: Side, rng: random.Random) -> Iterator[str]:
    while True:
        code = " ".join(rng.choices(CODE_LETTERS, k=_CODE_LENGTH))
        if side_of(code) == side:
            yield code


def _distinct(drawn: Iterator[str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[next(drawn)] = None
    return list(found)


def real_lines(texts: Sequence[str]) -> list[str]:
    """Return the lines of texts that are not empty. Raises BadInput where there are none."""
    lines = [line for text in texts for line in text.splitlines(keepends=True) if line.strip()]
    if not lines:
        raise BadInput("a haystack needs text: give documents that are not empty")
    return [line if line.endswith("\n") else line + "\n" for line in lines]


def lines_from(lines: Sequence[Line], rng: random.Random) -> Iterator[Line]:
    """Yield lines without end, from a random one on."""
    start = rng.randrange(len(lines))
    return (lines[place % len(lines)] for place in itertools.count(start))


@dataclass(frozen=True)
class NeedleTest:
    """What is asked: a grid of prompts.

    ``lengths`` count the tokens of prompt and answer together. Depth 0 is the haystack's beginning,
    1 its end. Every cell has ``samples`` prompts, each with ``others`` facts more that are not
    asked for.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 8
    others: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths or self.samples < 1:
            raise BadInput("a needle test needs lengths, depths and at least 1 sample a cell")
        if min(self.depths) < 0 or max(self.depths) > 1:
            raise BadInput(f"depths = {list(self.depths)}: write shares between 0 and 1")


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt: token ids, and the fact that it asks for."""

    ids: list[int]
    fact: Fact
    answer_tokens: int


class Answers(Protocol):
    """What answers prompts: an ``LLM``."""

    tokenizer: Tokenizer | None

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        on_progress: Progress | None = None,
    ) -> Sequence[Any]:
        """Answer every prompt, in their order."""
        ...


class Haystack:
    """Real text in lines of tokens, from which prompts of an exact length are made."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, first: int = 0) -> None:
        """``first`` begins every prompt. Raises BadInput where there is no text."""
        self._tokenizer, self._first = tokenizer, first
        self._lines = [self._ids(line) for line in real_lines(texts)]

    def prompt(
        self, fact: Fact, others: Sequence[Fact], length: int, depth: float, rng: random.Random
    ) -> NeedlePrompt:
        """Hide a fact at a depth, and others anywhere; ask for it at the end.

        Raises BadInput for a length with no room for that.
        """
        sentences = [self._ids(other.sentence) for other in others]
        needle, question = self._ids(fact.sentence), self._ids(fact.question)
        answer = max(1, len(needle) - len(question))
        room = length - 1 - len(needle) - len(question) - answer - sum(map(len, sentences))
        if room < 0:
            raise BadInput(f"needles of {length} tokens: no room for the facts: give longer ones")
        pieces = list(self._filled(room, rng))
        borders = np.cumsum([0, *map(len, pieces)])
        # At a border of lines, the nearest to the depth.
        place = int(np.abs(borders - depth * room).argmin())
        inserted = [(place, needle)]
        inserted += [(rng.randint(0, len(pieces)), ids) for ids in sentences]
        for where, ids in sorted(inserted, key=lambda pair: -pair[0]):
            pieces.insert(where, ids)
        ids = [self._first, *itertools.chain.from_iterable(pieces), *question]
        return NeedlePrompt(ids, fact, answer)

    def _filled(self, room: int, rng: random.Random) -> Iterator[list[int]]:
        """Yield lines that have ``room`` tokens together; the first is the rest of one."""
        found: list[list[int]] = []
        for line in lines_from(self._lines, rng):
            if room <= len(line):
                break
            found.append(line)
            room -= len(line)
        rest = line[len(line) - room :]
        return iter([rest, *found] if rest else found)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def fewest_tokens(tokenizer: Tokenizer, others: int) -> int:
    """Return the length that has room for any fact, its question and answer, and ``others``."""
    drawn = draw_facts(_SEEN_FACTS, "test", random.Random(0))
    longest = max(len(tokenizer.encode(fact.sentence).ids) for fact in drawn)
    return (2 + others) * (longest + _SPARE_TOKENS) + 1


def needle_prompts(haystack: Haystack, test: NeedleTest) -> Iterator[tuple[int, int, NeedlePrompt]]:
    """Yield the places of every cell, in lengths and in depths, and its prompts."""
    for row, length in enumerate(test.lengths):
        for column, depth in enumerate(test.depths):
            for sample in range(test.samples):
                rng = random.Random(f"needle/{test.seed}/{length}/{depth}/{sample}")
                fact, *others = draw_facts(1 + test.others, "test", rng)
                yield row, column, haystack.prompt(fact, others, length, depth, rng)


def needle_map(
    llm: Answers,
    texts: Sequence[str],
    test: NeedleTest,
    on_progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Return the share of right answers by length and depth, ``[lengths, depths]``.

    ``texts`` are the haystack, which nobody has trained on. Answers are greedy; one is right if it
    is the whole code and nothing more, so a code that is nearly right counts nothing.
    """
    if llm.tokenizer is None:
        raise BadInput("this checkpoint has no tokenizer.json: needles are text")
    cells = list(needle_prompts(Haystack(texts, llm.tokenizer), test))
    params = [
        SamplingParams(temperature=0.0, max_tokens=prompt.answer_tokens) for *_, prompt in cells
    ]
    prompts = [{"prompt_token_ids": prompt.ids} for *_, prompt in cells]
    outputs = llm.generate(prompts, params, on_progress=on_progress)
    right = np.zeros((len(test.lengths), len(test.depths)))
    for (row, column, prompt), output in zip(cells, outputs, strict=True):
        right[row, column] += prompt.fact.answered_by(output.outputs[0].text)
    return right / test.samples
