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

_CONSONANTS, _VOWELS, _LETTERS = "bdfgklmnprstvz", "aeiou", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CODE_LETTERS = 4
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
    names, codes = _names(side, rng), _codes(side, rng)
    return [
        Fact(*pair) for pair in zip(_distinct(names, count), _distinct(codes, count), strict=True)
    ]


def side_of(text: str) -> Side:
    """Return for what a name or a code is used."""
    return "test" if zlib.crc32(text.encode()) % _TEST_EVERY == 0 else "train"


def _names(side: Side, rng: random.Random) -> Iterator[str]:
    while True:
        parts = (_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS, _CONSONANTS)
        name = "".join(map(rng.choice, parts)).capitalize()
        if side_of(name) == side:
            yield name


def _codes(side: Side, rng: random.Random) -> Iterator[str]:
    while True:
        code = " ".join(rng.choices(_LETTERS, k=_CODE_LETTERS))
        if side_of(code) == side:
            yield code


def _distinct(drawn: Iterator[str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[next(drawn)] = None
    return list(found)


# --- text that teaches it -------------------------------------------------------------------------


def recall_documents(
    texts: Sequence[str],
    count: int,
    *,
    characters: tuple[int, int],
    seed: int,
    facts: int = 8,
    most: int = 64,
    told: tuple[float, float] = (0.1, 1.0),
) -> Iterator[str]:
    """Yield documents that teach recall at many distances: real lines, and facts between them.

    A document is about as long as a number between ``characters``, small ones as often as large
    ones by ratio. It has 2 to ``facts`` facts in up to ``most`` sentences, each twice or oftener
    and never next to itself: what follows a name that was there before can be known, by its name.
    Between the shares ``told`` of it are facts: a network finds out in short dense ones that
    looking back pays, and in others how far. They are mixed into pre-training's text, and into the
    extension's, where long ones teach long distances.
    """
    lines = _lines(texts)
    for number in range(count):
        rng = random.Random(f"recall/{seed}/{number}")
        low, high = characters
        size = int(low * (high / low) ** rng.random())
        length = len(Fact("Belon", "K D W R").sentence)
        sentences = min(most, max(4, int(size * rng.uniform(*told) / length)))
        chosen = draw_facts(rng.randint(2, min(facts, sentences // 2)), "train", rng)
        said = _said_apart(chosen, sentences, rng)
        room = max(0, size - sum(len(fact.sentence) for fact in said))
        yield _scattered(list(_run(lines, room, rng)), said, rng)


def _said_apart(chosen: Sequence[Fact], count: int, rng: random.Random) -> list[Fact]:
    """Return facts in an order in which each comes twice or oftener, and none follows itself.

    A network that could copy the sentence before would never learn to look for a name.
    """
    said = list(chosen)
    second = rng.sample(chosen, len(chosen))
    if second[0] == said[-1]:
        second.reverse()
    said += second
    while len(said) < count:
        said.append(rng.choice([fact for fact in chosen if fact != said[-1]]))
    return said


def _scattered(lines: list[str], said: Sequence[Fact], rng: random.Random) -> str:
    """Put sentences between lines, in their order."""
    drawn = sorted(rng.random() for _ in said)
    places = [(place, fact.sentence) for place, fact in zip(drawn, said, strict=True)]
    between = [((number + rng.random()) / len(lines), line) for number, line in enumerate(lines)]
    between.sort()
    return "".join(text for _, text in sorted([*between, *places], key=lambda pair: pair[0]))


def _lines(texts: Sequence[str]) -> list[str]:
    lines = [line for text in texts for line in text.splitlines(keepends=True) if line.strip()]
    if not lines:
        raise BadInput("a haystack needs text: give documents that are not empty")
    return [line if line.endswith("\n") else line + "\n" for line in lines]


def _run(lines: Sequence[str], size: int, rng: random.Random) -> Iterator[str]:
    """Yield lines from a random one on, until they have ``size`` characters."""
    for line in _from(lines, rng):
        size -= len(line)
        if size < 0:
            return
        yield line


def _from(lines: Sequence[Line], rng: random.Random) -> Iterator[Line]:
    """Yield lines without end, from a random one on."""
    start = rng.randrange(len(lines))
    return (lines[place % len(lines)] for place in itertools.count(start))


# --- the test -------------------------------------------------------------------------------------


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
        self._lines = [self._ids(line) for line in _lines(texts)]

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
        for line in _from(self._lines, rng):
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
