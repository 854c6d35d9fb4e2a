"""What became of one request: its times, its tokens, its text, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ziphius.serving.bench.stream import FINISH_REASONS, Fault, Piece, Reader

REFUSED = "refused"


class Gap(NamedTuple):
    """``tokens`` that came together, each ``seconds`` after the one before it."""

    seconds: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request. Times are seconds from its beginning: when it was sent, or due in an open loop.

    ``last`` is when the last token came. ``counted`` says where ``output_tokens`` is from:
    ``usage``, or ``chunks`` where the server sent none. ``refusals`` were answered by 429 or 503,
    and ``hints`` of them said when to come back. ``late`` is how long after its time it was sent.
    """

    prompt: int
    began: float
    ended: float
    first: float | None = None
    last: float | None = None
    gaps: tuple[Gap, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    counted: str = "usage"
    text: str = ""
    fault: Fault | None = None
    refusals: int = 0
    hints: int = 0
    late: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether there is a whole answer."""
        return self.fault is None

    @property
    def refused(self) -> bool:
        """Whether the server declined it in order, because it is busy."""
        return self.fault is not None and self.fault.kind == REFUSED

    @property
    def seconds(self) -> float:
        """From its beginning to the end of the stream."""
        return self.ended - self.began

    @property
    def per_token(self) -> float | None:
        """Seconds a token, from the first chunk to the last; None where all came at once."""
        tokens = sum(gap.tokens for gap in self.gaps)
        return sum(gap.seconds * gap.tokens for gap in self.gaps) / tokens if tokens else None


def read_outcome(
    reader: Reader, *, prompt: int, began: float, ended: float, most: int, **more: Any
) -> Outcome:
    """Return what a stream that has ended gave. ``most`` is how many tokens were asked for.

    ``more`` are fields of ``Outcome`` that the stream does not tell.
    """
    pieces = reader.pieces
    total = _count(reader.usage.get("completion_tokens"))
    if not pieces and total and reader.finished_at is not None:
        # The tokens have no text, such as an end that comes at once.
        pieces = [Piece(reader.finished_at, None)]
    counts = tokens_of(pieces, total)
    times = [piece.at for piece in pieces]
    details = reader.usage.get("prompt_tokens_details")
    return Outcome(
        prompt=prompt,
        began=began,
        ended=ended,
        first=times[0] - began if times else None,
        last=times[-1] - began if times else None,
        gaps=gaps(times, counts),
        prompt_tokens=_count(reader.usage.get("prompt_tokens")),
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        output_tokens=sum(counts) if total is None else total,
        counted="chunks" if total is None else "usage",
        text=reader.text,
        fault=find_fault(reader, total, most),
        **more,
    )


def find_fault(reader: Reader, total: int | None, most: int) -> Fault | None:
    """Return what is wrong with a stream that has ended; ``total`` is the usage's count."""
    if reader.fault is not None:
        return reader.fault
    if reader.finish_reason is None:
        mark = "with" if reader.done else "without"
        return Fault(
            "truncated", f"no finish_reason after {len(reader.pieces)} chunks, {mark} [DONE]"
        )
    if reader.finish_reason not in FINISH_REASONS:
        return Fault("aborted", f"finish_reason is {reader.finish_reason!r}")
    if not reader.done:
        return Fault("truncated", f"no [DONE] after {len(reader.pieces)} chunks")
    if not reader.pieces and not total:
        return Fault("empty", "the stream ended in order and held no text")
    if total is None:
        return None
    return _usage_fault(reader, total, most)


def _usage_fault(reader: Reader, total: int, most: int) -> Fault | None:
    """Compare the server's count with what it has streamed."""
    running = [piece.tokens for piece in reader.pieces if piece.tokens is not None]
    prompt, whole = (_count(reader.usage.get(f"{kind}_tokens")) for kind in ("prompt", "total"))
    # Text that was held back may come in one more chunk, at the end.
    if len(reader.pieces) > total + 1:
        said = f"{total} tokens, and {len(reader.pieces)} chunks had text"
    elif total > most:
        said = f"{total} tokens, and {most} were asked for"
    elif running and (running != sorted(running) or running[-1] > total):
        said = f"{total} tokens at the end, and {max(running)} before"
    elif prompt is not None and whole is not None and prompt + total != whole:
        said = f"{prompt} and {total} tokens are {whole}"
    else:
        return None
    return Fault("usage", f"the server says {said}")


def tokens_of(pieces: Sequence[Piece], total: int | None) -> list[int]:
    """Return how many tokens each chunk brought.

    By the server's running count where every chunk has one, else ``total`` spread evenly over the
    chunks, else one each.
    """
    running = [piece.tokens for piece in pieces if piece.tokens is not None]
    if pieces and len(running) == len(pieces):
        return [max(0, now - before) for before, now in pairwise([0, *running])]
    if total is None:
        return [1] * len(pieces)
    return [(i + 1) * total // len(pieces) - i * total // len(pieces) for i in range(len(pieces))]


def gaps(times: Sequence[float], counts: Sequence[int]) -> tuple[Gap, ...]:
    """Return the time between tokens: a chunk of k after s seconds is k gaps of s/k.

    Chunks that came at the same moment are one, and one without a token belongs to the next. The
    tokens of the first have no time between them.
    """
    found: list[Gap] = []
    last: float | None = None
    for at, count in zip(times, counts, strict=True):
        if not count:
            continue
        if last is None or (at == last and not found):
            last = at
        elif at == last:
            seconds, tokens = found[-1]
            found[-1] = Gap(seconds * tokens / (tokens + count), tokens + count)
        else:
            found.append(Gap((at - last) / count, count))
            last = at
    return tuple(found)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
