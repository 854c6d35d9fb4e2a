"""Strings that must not appear in an answer, however they are cut into tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np

from ziphius.inference.logits import Ids
from ziphius.inference.vocabulary import Vocabulary


class BadWords:
    """Forbids each token that would complete a bad word in the answer's text.

    A word is matched byte for byte anywhere in the text, inside other words too; the prompt does
    not count. A token is forbidden always when it contains a word, and when it begins with the rest
    of a word of which the text so far ends with the beginning.
    """

    def __init__(self, vocabulary: Vocabulary, words: Sequence[str], skip_special: bool) -> None:
        self._vocabulary, self._skip_special = vocabulary, skip_special
        self._words = [word.encode() for word in words]
        # A hidden special token has no text, so it completes nothing.
        self._hidden = vocabulary.special if skip_special else frozenset()
        self._longest = max(len(word) for word in self._words)
        self._always = self._ids(
            token
            for token, spelling in enumerate(vocabulary.spellings)
            if any(word in spelling for word in self._words)
        )
        # For each beginning of a word, the tokens that finish it.
        self._after: dict[bytes, Ids] = {}
        for word in self._words:
            for cut in range(1, len(word)):
                finishing = self._ids(self._beginning_with(word[cut:]))
                known = self._after.get(word[:cut], finishing)
                self._after[word[:cut]] = np.union1d(known, finishing)

    def banned(self, output: Sequence[int]) -> Ids:
        """Return the tokens that may not follow ``output``."""
        tail = b""
        for token in reversed(output):
            tail = self._vocabulary.text_bytes(token, self._skip_special) + tail
            if len(tail) >= self._longest - 1:
                break
        after = [ids for beginning, ids in self._after.items() if tail.endswith(beginning)]
        return np.concatenate((self._always, *after))

    def _beginning_with(self, start: bytes) -> Iterator[int]:
        spellings, tokens = self._vocabulary.sorted_tokens
        for place in range(bisect_left(spellings, start), len(spellings)):
            if not spellings[place].startswith(start):
                return
            yield tokens[place]

    def _ids(self, tokens: Iterator[int]) -> Ids:
        return np.array([t for t in tokens if t not in self._hidden], np.intp)
