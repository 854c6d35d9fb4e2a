"""Tokens that join punctuation and line breaks are split at random (report 4.1, facts 6.1).

A prompt that ends without a line break after its punctuation would else be unlike anything seen in
training. The report leaves the share open.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, pre_tokenizers

from ziphius.data.randomness import draw, happens
from ziphius.data.tokenizer import PUNCTUATION, plain_text_tokenizer


class TokenSplit:
    """Splits each occurrence of a joined token with probability ``rate``.

    The token becomes the tokens of its punctuation, then those of its line breaks: the decoded
    text stays the same. Whether it does depends on the seed, the document's key, the epoch and the
    position in the document alone.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int) -> None:
        self._rate, self._seed = rate, seed
        table = joined_tokens(tokenizer)
        size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._counts = np.zeros(size, dtype=np.int64)  # by id; 0 for a token that is not joined
        self._starts = np.zeros(size, dtype=np.int64)
        flat: list[int] = []
        for index, parts in table.items():
            self._counts[index], self._starts[index] = len(parts), len(flat)
            flat += parts
        self._parts = np.array(flat, dtype=np.int32)

    def apply(
        self,
        tokens: NDArray[np.int32],
        lengths: NDArray[np.int64],
        keys: NDArray[np.uint64],
        epochs: NDArray[np.int64],
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return tokens and lengths of documents that lie one behind the other in ``tokens``."""
        places = np.flatnonzero(self._counts[tokens])
        ends = np.cumsum(lengths)
        document = np.searchsorted(ends, places, side="right")
        position = places - (ends - lengths)[document]
        hashes = draw("split", self._seed, epochs[document], keys[document], position)
        split = happens(hashes, self._rate)
        places, document = places[split], document[split]
        counts = self._counts[tokens[places]]
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[places] = counts
        result = np.repeat(tokens, repeats)
        # Split tokens stand repeated at their places now: write their parts over them.
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        moved = places + np.cumsum(counts - 1) - (counts - 1)
        result[np.repeat(moved, counts) + nth] = self._parts[
            np.repeat(self._starts[tokens[places]], counts) + nth
        ]
        added = np.bincount(document, weights=counts - 1, minlength=len(lengths))
        return result, lengths + added.astype(np.int64)


def joined_tokens(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Return, by id, the parts of every token of punctuation followed by line breaks.

    Such a token is one whole match of the pre-tokeniser's branch for punctuation, with at least one
    line break. Its parts are the tokens of the punctuation, then those of the line breaks.
    """
    plain = plain_text_tokenizer(tokenizer)
    joined = pre_tokenizers.Split(Regex(rf"\A{PUNCTUATION}[\r\n]+\z"), "removed")
    breaks = tuple(_spelled(byte) for byte in "\r\n")
    added = tokenizer.get_added_tokens_decoder().keys()
    table: dict[int, list[int]] = {}
    for piece, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index in added or not piece.endswith(breaks):
            continue
        text = tokenizer.decode([index], skip_special_tokens=False)
        # A token that ends in the middle of a character decodes to something else than itself.
        if _spelled(text) != piece or joined.pre_tokenize_str(text):
            continue
        punctuation = text.rstrip("\r\n")
        parts = plain.encode_batch([punctuation, text[len(punctuation) :]])
        table[index] = parts[0].ids + parts[1].ids
    return table


def _spelled(text: str) -> str:
    """Spell a text as a byte-level vocabulary does: a character for every byte."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))
