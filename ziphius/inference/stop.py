"""An answer's text as its tokens come, and where it ends."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from ziphius.config.errors import BadInput
from ziphius.inference.params import SamplingParams
from ziphius.inference.vocabulary import ByteDecoder, Vocabulary


class Finish(NamedTuple):
    """Why an answer ended. ``matched`` is the stop string, or the id of ``stop_token_ids``; it is
    None for the model's own end token and for the length.
    """

    reason: Literal["stop", "length"]
    matched: str | int | None = None


class AnswerText:
    """Turns an answer's tokens into text, piece by piece, and says when it ends.

    The pieces joined are the text of all tokens decoded at once, up to the stop, wherever the
    tokens cut the text. A piece is held back only while it ends inside a character, or with what
    may be the beginning of a stop string that would be left out.

    The stop string that ends first counts; of two that end together, the one that begins first. One
    that is complete within the first ``min_tokens`` tokens does not count.
    """

    def __init__(
        self, vocabulary: Vocabulary | None, params: SamplingParams, end_ids: Collection[int] = ()
    ) -> None:
        """``end_ids`` are the model's own end tokens. Without a vocabulary there is no text.

        Raises BadInput for stop strings without a vocabulary to spell the text.
        """
        if vocabulary is None and params.stop:
            raise BadInput("stop strings need a tokenizer: this model has none")
        self.finish: Finish | None = None
        # Where each token's text begins, counted in characters of the answer. Inside a character it
        # is that character's place.
        self.offsets: list[int] = []
        self._vocabulary = vocabulary if params.detokenize else None
        self._params = params
        self._end_ids = frozenset() if params.ignore_eos else frozenset(end_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._stops = tuple(params.stop)
        self._decoder = ByteDecoder()
        self._length = 0  # of the text decoded so far, in characters
        # The longest end of the text that a stop string begins with.
        self._tail = ""

    def push(self, token: int) -> str:
        """Take the next token; return the text that can be shown now. ``finish`` may be set.

        A stop token has no text, unless stops are to be included. Not to be called after the end.
        """
        assert self.finish is None, "the answer has ended"
        self.offsets.append(self._length)
        params = self._params
        if token in self._stop_ids or token in self._end_ids:
            shown = self._decode(token) if params.include_stop_str_in_output else ""
            own = token in self._end_ids and token not in self._stop_ids
            return self._take(shown) + self.end(Finish("stop", None if own else token))
        text = self._take(self._decode(token))
        if self.finish is None and len(self.offsets) == params.max_tokens:
            text += self.end(Finish("length"))
        return text

    def end(self, finish: Finish) -> str:
        """End the answer here, for a reason of the caller's; return the text that was held back.

        A stop string that the last, incomplete character completes goes before that reason.
        """
        if self.finish is not None:
            return ""
        text = self._take(self._decoder.close())
        if self.finish is None:
            self.finish = finish
            text += self._held()
        return text

    def _decode(self, token: int) -> str:
        if self._vocabulary is None:
            return ""
        skip = self._params.skip_special_tokens
        return self._decoder.push(self._vocabulary.text_bytes(token, skip))

    def _held(self) -> str:
        """Return the end of the text that was not shown yet."""
        return "" if self._params.include_stop_str_in_output else self._tail

    def _take(self, new: str) -> str:
        """Add ``new`` to the text; return what can be shown, up to a stop string if one is met."""
        if self.finish is not None or not new:
            return ""
        if not self._stops:
            self._length += len(new)
            return new
        seen = self._tail + new
        start = self._length - len(self._tail)  # of ``seen`` in the text
        shown = len(self._tail) - len(self._held())
        if len(self.offsets) > self._params.min_tokens and (match := self._match(seen)):
            end, begin, stop = match
            self.finish = Finish("stop", stop)
            cut = end if self._params.include_stop_str_in_output else begin
            self._length = start + cut
            self.offsets = [min(offset, self._length) for offset in self.offsets]
            return seen[shown:cut]
        self._length += len(new)
        self._tail = _beginning_of_a_stop(seen, self._stops)
        return seen[shown : len(seen) - len(self._held())]

    def _match(self, seen: str) -> tuple[int, int, str] | None:
        """Return the stop string that ends first in ``seen``, after the old tail: its end, its
        beginning and itself.
        """
        found = []
        for stop in self._stops:
            begin = seen.find(stop, max(0, len(self._tail) - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin, stop))
        return min(found, default=None)


def _beginning_of_a_stop(text: str, stops: tuple[str, ...]) -> str:
    """Return the longest end of ``text`` that is a beginning of a stop string, not all of it."""
    longest = max(len(stop) for stop in stops) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(len(stop) > size and stop.startswith(tail) for stop in stops):
            return tail
    return ""
