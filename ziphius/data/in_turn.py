"""A mixture that changes during the run: streams of batches, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ziphius.config.errors import BadInput
from ziphius.config.moment import Span, moment_tokens
from ziphius.data.loader import Loader
from ziphius.data.rows import Batch


def stretches(spans: Sequence[Span], total: int) -> list[tuple[int, list[int]]]:
    """Divide a run of ``total`` tokens where a source begins or ends.

    Return the tokens at which each stretch begins, and the places of the sources that are read in
    it. Raises BadInput for a stretch without sources.
    """
    read = [tuple(moment_tokens(moment, total) for moment in span) for span in spans]
    borders = sorted({0, *(tokens for span in read for tokens in span if tokens < total)})
    found = []
    for border in borders:
        active = [place for place, (begin, end) in enumerate(read) if begin <= border < end]
        if not active:
            raise BadInput(
                f"data.sources: none is read {border:,} tokens into the run of {total:,}: let one "
                "begin earlier, or end later"
            )
        found.append((border, active))
    return found


class InTurn:
    """Streams of batches, each from some token of the run on until the next one begins.

    A batch is of one stream: that of its first token.
    """

    def __init__(self, streams: Sequence[tuple[int, Loader]]) -> None:
        """Take streams in their order, and the tokens at which each begins: the first one at 0."""
        assert streams[0][0] == 0, "a run begins with the first stream"
        self._begins = [begin for begin, _ in streams]
        self._streams = [stream for _, stream in streams]
        self._tokens = 0

    def next_batch(self, batch_size: int) -> Batch:
        """Return the next rows of the stream whose turn it is. Raises what this one does."""
        stream = self._streams[self.turn]
        batch = stream.next_batch(batch_size)
        self._tokens += batch_size * stream.sequence_length
        return batch

    @property
    def padding(self) -> float:
        """The share of padding in what is dealt out now."""
        return self._streams[self.turn].padding

    @property
    def tokens_per_epoch(self) -> int:
        """The tokens of all streams."""
        return sum(stream.tokens_per_epoch for stream in self._streams)

    def state(self) -> dict[str, Any]:
        """Return, as JSON, where every stream is, and how many tokens were dealt out."""
        return {
            "tokens": self._tokens,
            "begins": self._begins,
            "streams": [stream.state() for stream in self._streams],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises BadInput, and changes nothing, for that of other streams or other turns.
        """
        if {"tokens", "begins", "streams"} - state.keys() or state["begins"] != self._begins:
            raise BadInput(
                "loader state: sources began and ended elsewhere in the run: resume with the "
                "mixture and the length that the run began with"
            )
        before = self.state()
        try:
            for stream, saved in zip(self._streams, state["streams"], strict=True):
                stream.load_state(saved)
        except BadInput:
            for stream, saved in zip(self._streams, before["streams"], strict=True):
                stream.load_state(saved)
            raise
        self._tokens = int(state["tokens"])

    @property
    def at_rest(self) -> bool:
        """The streams can stop behind any batch."""
        return True

    def forget(self) -> None:
        """Nothing depends on weights."""

    def close(self) -> None:
        """End the threads of all streams."""
        for stream in self._streams:
            stream.close()

    def require_rows(self, batch_size: int) -> None:
        """Raise BadInput when an epoch of a stream has fewer rows than a batch."""
        for stream in self._streams:
            stream.require_rows(batch_size)

    @property
    def turn(self) -> int:
        """Whose turn it is: the place of the stream that the next batch is of."""
        return max(n for n, begin in enumerate(self._begins) if begin <= self._tokens)
