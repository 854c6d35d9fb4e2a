"""Words letter by letter: reversed, and a letter counted. Blanks keep the letters apart."""

from __future__ import annotations

from collections.abc import Hashable
from random import Random
from string import ascii_lowercase

from ziphius.alignment.tasks.level import LeveledTask
from ziphius.alignment.tasks.problem import Problem

_REVERSAL = (
    "Reverse {word}.",
    "Write {word} backwards.",
    "Spell {word} from its end.",
)
_LETTERS = (
    "How many {letter} are in {word}?",
    "Count the {letter} in {word}.",
    "How often is {letter} in {word}?",
)
_VOWELS = "aeiou"
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"


class Reversal(LeveledTask):
    """Words backwards; the steps number their letters."""

    kind = "reversal"

    def draw(self, random: Random) -> Problem:
        """Return a word that is no palindrome."""
        low, high = self.at(((3, 4), (5, 6), (7, 9), (10, 14), (15, 20)))
        word = ""
        while word == word[::-1]:
            word = _pronounceable(random, random.randint(low, high))
        numbered = [f"{place} {letter}" for place, letter in enumerate(word, start=1)]
        return self.problem(
            random,
            _REVERSAL,
            {"word": " ".join(word)},
            answer=" ".join(reversed(word)),
            key=word,
            steps=[", ".join(numbered), ", ".join(reversed(numbered))],
        )

    def read(self, text: str) -> Hashable:
        """Return the letters; blanks, commas and hyphens between them mean nothing."""
        return letters_of(text)


class Letters(LeveledTask):
    """How often a letter is in a word; the steps count along it."""

    kind = "letters"

    def draw(self, random: Random) -> Problem:
        """Return a word of few different letters and one of these."""
        length, different = self.at(((5, 3), (8, 3), (11, 4), (15, 5), (22, 6)))
        letters = random.sample(ascii_lowercase, different)
        word = "".join(random.choices(letters, k=length))
        letter = random.choice(letters)
        counted = [f"{c} {word[: end + 1].count(letter)}" for end, c in enumerate(word)]
        return self.problem(
            random,
            _LETTERS,
            {"letter": letter, "word": " ".join(word)},
            answer=self.spell(word.count(letter)),
            key=f"{letter} in {word}",
            steps=[", ".join(counted)],
        )


def letters_of(text: str) -> str | None:
    """Return the small letters of a text that has nothing else but blanks, commas and hyphens."""
    letters = "".join(c for c in text.lower() if c not in " ,-\t\n")
    return letters if letters and set(letters) <= set(ascii_lowercase) else None


def _pronounceable(random: Random, length: int) -> str:
    kinds = random.sample((_VOWELS, _CONSONANTS), 2)
    return "".join(random.choice(kinds[place % 2]) for place in range(length))
