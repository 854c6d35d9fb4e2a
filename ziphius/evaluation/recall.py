"""Text that teaches a network to look back: what it has to find is in the row, and nowhere else.

A small network finds no needle unless it was taught to, and in this order (dev/LOG.md):

1. Words in a random order, said twice (``copy_documents``), and nothing else. Whoever looks for
   what followed a word before knows half of the text; nothing else helps.
2. Facts among real lines (``recall_documents``), mixed into other text. Without the first it
   learns what the codes of a document are, not which belongs to whom.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from ziphius.config.errors import BadInput
from ziphius.evaluation.needle import (
    CODE_LETTERS,
    Fact,
    draw_facts,
    draw_names,
    lines_from,
    real_lines,
)

_SENTENCE = len(Fact("Belon", "K D W R").sentence)
# Two facts could be told apart by their turns.
_FEWEST_FACTS = 3

_WORD = re.compile(r"(?<= )[a-z]{2,}(?= )")
_WORDS, _NAMES = 200, 2000  # from which copies are drawn: few enough to be met often
_COPIED = (4, 39)  # parts of what is copied


def copy_documents(
    texts: Sequence[str], count: int, *, seed: int, alike: float = 0.0
) -> Iterator[str]:
    """Yield documents that are one line of 4 to 39 parts, said twice or three times.

    Parts are drawn from the commonest words of ``texts``, names as facts have them, and letters: a
    network learns to copy each by itself. A share ``alike`` of the lines has parts of one kind.
    Raises BadInput for texts without words.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text))
    words = [word for word, _ in counts.most_common(_WORDS)]
    if not words:
        raise BadInput("copies need words: give documents that have some")
    drawn = draw_names("train", random.Random(f"names/{seed}"))
    names = [next(drawn) for _ in range(_NAMES)]
    kinds = (words, words, names, CODE_LETTERS)
    for number in range(count):
        rng = random.Random(f"copies/{seed}/{number}")
        chosen = [rng.choice(kinds)] if rng.random() < alike else kinds
        parts = [rng.choice(rng.choice(chosen)) for _ in range(rng.randint(*_COPIED))]
        yield (" ".join(parts) + "\n") * rng.choice((2, 2, 3))


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
    ones by ratio. It has 3 to ``facts`` facts in up to ``most`` sentences. Each is said once, and
    what follows is drawn from them: how far back the last one of a name lies says nothing, so that
    its name has to be looked for. Between the shares ``told`` of a document are facts, and three
    sentences a fact at least.
    """
    lines = real_lines(texts)
    for number in range(count):
        rng = random.Random(f"recall/{seed}/{number}")
        low, high = characters
        size = int(low * (high / low) ** rng.random())
        least = _FEWEST_FACTS**2
        sentences = min(most, max(least, int(size * rng.uniform(*told) / _SENTENCE)))
        kinds = min(facts, sentences // _FEWEST_FACTS)
        said = draw_facts(rng.randint(_FEWEST_FACTS, max(_FEWEST_FACTS, kinds)), "train", rng)
        said += rng.choices(said, k=sentences - len(said))
        room = max(0, size - sum(len(fact.sentence) for fact in said))
        yield _scattered(list(_run(lines, room, rng)), said, rng)


def _scattered(lines: list[str], said: Sequence[Fact], rng: random.Random) -> str:
    """Put sentences between lines, in their order."""
    drawn = sorted(rng.random() for _ in said)
    places = [(place, fact.sentence) for place, fact in zip(drawn, said, strict=True)]
    between = [((number + rng.random()) / len(lines), line) for number, line in enumerate(lines)]
    between.sort()
    return "".join(text for _, text in sorted([*between, *places], key=lambda pair: pair[0]))


def _run(lines: Sequence[str], size: int, rng: random.Random) -> Iterator[str]:
    """Yield lines from a random one on, until they have ``size`` characters."""
    for line in lines_from(lines, rng):
        size -= len(line)
        if size < 0:
            return
        yield line
