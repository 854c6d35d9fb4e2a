"""Strings that must not appear in an answer, however they are cut into tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ziphius.inference.logits import Ids, ids
from ziphius.inference.vocabulary import Vocabulary


class BadWords:
    """Forbids each token that would complete a bad word in the answer's text.

    A word is matched byte for byte anywhere in the text, inside other words too; the prompt does
    not count. A token is forbidden always when it contains a word, and when it begins with the rest
    of a word of which the text so far ends with the beginning.
    """

    def __init__(self, vocabulary: Vocabulary, words: Sequence[str], skip_special: bool) -> None:
        self._vocabulary, self._skip_special = vocabulary, skip_special
        spelled = [word.encode() for word in words]
        self._longest = max(len(word) for word in spelled)
        always: set[int] = set().union(*map(vocabulary.containing, spelled))
        # For each beginning of a word, the tokens that finish it.
        after: defaultdict[bytes, set[int]] = defaultdict(set)
        for word in spelled:
            for cut in range(1, len(word)):
                after[word[:cut]] |= vocabulary.beginning_with(word[cut:])
        # A hidden special token has no text, so it completes nothing.
        hidden = vocabulary.special if skip_special else frozenset[int]()
        self._always = ids(sorted(always - hidden))
        self._after = {start: ids(sorted(found - hidden)) for start, found in after.items()}

    def banned(self, output: Sequence[int]) -> Ids:
        """Return the tokens that may not follow ``output``."""
        tail = b""
        for token in reversed(output):
            tail = self._vocabulary.text_bytes(token, self._skip_special) + tail
            if len(tail) >= self._longest - 1:
                break
        after = [found for start, found in self._after.items() if tail.endswith(start)]
        return np.concatenate((self._always, *after))
