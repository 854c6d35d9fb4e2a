"""Fill in the middle: some documents are rearranged, so that the model learns to fill a gap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.data.randomness import draw, happens
from ziphius.data.tokenizer import (
    BOS_ID,
    EOS_ID,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    plain_text_tokenizer,
)

# Fewer characters cannot be cut into three parts with something in each.
_SHORTEST = 3
_AT_ONCE = 64


class FillInTheMiddle:
    """The report's prefix-suffix-middle rearrangement of whole documents (4.1, facts 6.2).

    A document becomes BOS, ``<｜fim▁begin｜>``, prefix, ``<｜fim▁hole｜>``, suffix,
    ``<｜fim▁end｜>``, middle, EOS. BOS comes first as it begins every text, also a prompt. The two
    cuts are a pair of different places between characters, all pairs being equally likely (the
    report does not say which law it used); no part is empty. The parts are tokenised one by one,
    so that the model meets cuts inside what would be one token.

    Whether and where a document is cut depends on the seed, its key and the epoch alone.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int) -> None:
        """Raises BadInput for a tokenizer that lacks one of the three tokens."""
        self._rate, self._seed = rate, seed
        ids = {name: tokenizer.token_to_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)}
        missing = [name for name, index in ids.items() if index is None]
        if missing:
            raise BadInput(
                f"data.fim_rate = {rate}: the tokenizer has no {' '.join(missing)}: "
                "set data.fim_rate = 0 or give a tokenizer of the DeepSeek-V3 family"
            )
        self._begin, self._hole, self._end = ids.values()
        self._tokenizer = plain_text_tokenizer(tokenizer)

    def apply(
        self,
        documents: Sequence[NDArray[np.int32]],
        keys: NDArray[np.uint64],
        epochs: NDArray[np.int64],
    ) -> list[NDArray[np.int32]]:
        """Return the documents with some rearranged; each is BOS, its tokens, EOS."""
        result = list(documents)
        chosen = np.flatnonzero(happens(draw("fim", self._seed, epochs, keys), self._rate))
        cuts = (
            draw("fim-one", self._seed, epochs[chosen], keys[chosen]),
            draw("fim-two", self._seed, epochs[chosen], keys[chosen]),
        )
        for start in range(0, len(chosen), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            ids = [documents[i][1:-1].tolist() for i in chosen[some]]
            texts = self._tokenizer.decode_batch(ids, skip_special_tokens=False)
            long = [n for n, text in enumerate(texts) if len(text) >= _SHORTEST]
            parts = [
                part
                for n in long
                for part in _three(texts[n], int(cuts[0][start + n]), int(cuts[1][start + n]))
            ]
            encoded = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
            for at, n in enumerate(long):
                prefix, middle, suffix = (e.ids for e in encoded[3 * at : 3 * at + 3])
                result[chosen[start + n]] = self._arrange(prefix, middle, suffix)
        return result

    def _arrange(
        self, prefix: list[int], middle: list[int], suffix: list[int]
    ) -> NDArray[np.int32]:
        ids = [BOS_ID, self._begin, *prefix, self._hole, *suffix, self._end, *middle, EOS_ID]
        return np.array(ids, dtype=np.int32)


def _three(text: str, first: int, second: int) -> tuple[str, str, str]:
    """Cut ``text`` at two different places inside, chosen by two random numbers."""
    places = len(text) - 1
    one, other = first % places, second % (places - 1)
    other += other >= one
    a, b = sorted((one + 1, other + 1))
    return text[:a], text[a:b], text[b:]
