"""How much of the reasoning is in the language it was asked for (facts 8.8)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import groupby

from ziphius.alignment.rewards.reward import Response, Reward
from ziphius.config.errors import BadInput

_SCRIPTS = {
    **dict.fromkeys(
        ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "cs", "sv", "tr", "vi", "id"), ("LATIN",)
    ),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ko": ("HANGUL",),
    **dict.fromkeys(("ru", "uk", "bg"), ("CYRILLIC",)),
    "el": ("GREEK",),
    "ar": ("ARABIC",),
    "fa": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
}
# Written without blanks: each letter counts as a word.
_UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "THAI"})
# What is in no language: code, formulas, commands of LaTeX, tags.
_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]"
    r"|\\[A-Za-z]+|</?\w+>|https?://\S+",
    re.DOTALL,
)
_LETTERS = re.compile(r"[^\W\d_]+")


def language_consistency(language: str) -> Reward:
    """Return the reward (words of a language)/(words) of the reasoning, from 0 to 1.

    ``language`` is a code like "en" or "zh". A word counts by its script, so languages of one
    script are not told apart: French passes for English. Code, formulas, numbers and single
    letters of scripts with longer words are left out. A response without reasoning gets 0, one
    whose reasoning has no words 1. Raises BadInput for a language that is not known here.
    """
    scripts = _SCRIPTS.get(language)
    if scripts is None:
        known = ", ".join(sorted(_SCRIPTS))
        raise BadInput(f"language {language!r} is not known: use one of {known}")

    def reward(response: Response) -> float:
        thinking = response.thinking
        return consistency(thinking, scripts) if thinking.strip() else 0.0

    return reward


def consistency(text: str, scripts: tuple[str, ...]) -> float:
    """Return the share of a text's words that are written in ``scripts``; 1 without words."""
    found = list(_words(text))
    return sum(script in scripts for script in found) / len(found) if found else 1.0


def _words(text: str) -> Iterator[str]:
    """Yield each word's script, by its name in Unicode."""
    for letters in _LETTERS.findall(_NO_LANGUAGE.sub(" ", text)):
        for script, run in groupby(letters, _script):
            length = len(list(run))
            if script in _UNSPACED:
                yield from [script] * length
            elif length > 1:
                yield script


def _script(letter: str) -> str:
    return unicodedata.name(letter, "NONE").partition(" ")[0]
