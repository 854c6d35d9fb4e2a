"""From chunks to tokens and the time between them, and which streams are faults."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.bench.mock import DONE, chunk, event, usage
from ziphius.serving.bench.outcome import Gap, Outcome, gaps, read_outcome, tokens_of
from ziphius.serving.bench.stream import Piece, Reader


def outcome_of(*pieces: bytes, most: int = 8, step: float = 1.0) -> Outcome:
    """Read pieces that come ``step`` seconds apart, the first after a step."""
    reader = Reader()
    for number, piece in enumerate(pieces, 1):
        reader.feed(100 + number * step, piece)
    reader.end()
    ended = 100 + (len(pieces) + 1) * step
    return read_outcome(reader, prompt=3, began=100.0, ended=ended, most=most)


END = chunk("", finish="stop")


def test_times_of_an_answer() -> None:
    tail = event({"choices": [], **usage(3, prompt_tokens_details={"cached_tokens": 2})})
    outcome = outcome_of(chunk("a"), chunk("b"), chunk("c"), END, tail, DONE)
    assert outcome.fault is None
    assert (outcome.first, outcome.last, outcome.seconds) == (1.0, 3.0, 7.0)
    assert outcome.gaps == (Gap(1.0, 1), Gap(1.0, 1))
    assert outcome.per_token == 1.0
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.output_tokens) == (5, 2, 3)
    assert (outcome.text, outcome.counted) == ("abc", "usage")


def test_a_chunk_of_several_tokens_is_divided() -> None:
    """As a server with drafts sends them: by its running count, or without one by their mean."""
    running = [chunk("a", **usage(1)), chunk("bcd", **usage(4)), chunk("e", **usage(5)), END]
    assert outcome_of(*running, DONE).gaps == (Gap(1 / 3, 3), Gap(1.0, 1))
    total = event({"choices": [], **usage(6)})
    pairs = outcome_of(chunk("ab"), chunk("cd"), chunk("ef"), END, total, DONE)
    assert pairs.gaps == (Gap(0.5, 2), Gap(0.5, 2))
    assert pairs.per_token == 0.5


def test_an_answer_of_one_chunk_has_no_time_between_tokens() -> None:
    outcome = outcome_of(chunk("abc", finish="stop", **usage(3)), DONE)
    assert outcome.fault is None
    assert (outcome.gaps, outcome.per_token, outcome.output_tokens) == ((), None, 3)


def test_tokens_without_text_count_and_have_a_first_moment() -> None:
    outcome = outcome_of(END, event({"choices": [], **usage(1)}), DONE)
    assert outcome.fault is None
    assert (outcome.first, outcome.output_tokens, outcome.text) == (1.0, 1, "")


def test_without_usage_a_chunk_is_a_token() -> None:
    outcome = outcome_of(chunk("a"), chunk("b"), END, DONE)
    assert outcome.fault is None
    assert (outcome.output_tokens, outcome.counted, outcome.prompt_tokens) == (2, "chunks", None)


@pytest.mark.parametrize(
    ("pieces", "kind", "said"),
    [
        ([], "truncated", "without [DONE]"),
        ([DONE], "truncated", "with [DONE]"),
        ([chunk("a"), DONE], "truncated", "no finish_reason after 1 chunks, with [DONE]"),
        ([chunk("a"), END], "truncated", "no [DONE]"),
        ([chunk("a", finish=""), DONE], "truncated", "no finish_reason"),
        ([chunk("a", finish="abort"), DONE], "aborted", "abort"),
        ([END, DONE], "empty", "no text"),
        ([END, event({"choices": [], **usage(0)}), DONE], "empty", "no text"),
        ([chunk("a", finish="stop", **usage(9)), DONE], "usage", "9 tokens, and 8 were asked"),
        ([*[chunk("a")] * 4, END, event({"choices": [], **usage(2)}), DONE], "usage", "4 chunks"),
        (
            [chunk("a", **usage(2)), chunk("b", finish="stop", **usage(1)), DONE],
            "usage", "1 tokens at the end, and 2 before",
        ),
        (
            [chunk("a", finish="stop", **usage(1, total_tokens=9)), DONE],
            "usage", "5 and 1 tokens are 9",
        ),
    ],
)  # fmt: skip
def test_streams_that_are_no_answers(pieces: list[bytes], kind: str, said: str) -> None:
    fault = outcome_of(*pieces).fault
    assert fault is not None
    assert fault.kind == kind
    assert said in fault.message


def test_text_held_back_until_the_end_is_no_wrong_count() -> None:
    """A stop string that did not come: its beginning is sent with the end."""
    pieces = [chunk("a", **usage(1)), chunk("b", **usage(2)), chunk("c", finish="stop", **usage(2))]
    assert outcome_of(*pieces, DONE).fault is None


# --- laws -----------------------------------------------------------------------------------------

MOMENTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=12)


@given(MOMENTS)
def test_gaps_are_the_time_and_the_tokens_behind_the_first(moments: list[tuple[int, int]]) -> None:
    times = sorted(float(at) for at, _ in moments)
    counts = [count for _, count in moments]
    found = gaps(times, counts)
    came = [at for at, count in zip(times, counts, strict=True) if count]
    if not came:
        assert found == ()
        return
    assert sum(g.seconds * g.tokens for g in found) == pytest.approx(came[-1] - came[0])
    at_first = sum(c for at, c in zip(times, counts, strict=True) if c and at == came[0])
    assert sum(gap.tokens for gap in found) == sum(counts) - at_first
    assert all(gap.seconds > 0 and gap.tokens > 0 for gap in found)


@given(MOMENTS, st.data())
def test_how_tokens_of_a_moment_are_cut_into_chunks_changes_nothing(
    moments: list[tuple[int, int]], data: st.DataObject
) -> None:
    times = sorted(float(at) for at, _ in moments)
    counts = [count for _, count in moments]
    split_times, split_counts = [], []
    for at, count in zip(times, counts, strict=True):
        first = data.draw(st.integers(0, count))
        split_times += [at, at]
        split_counts += [first, count - first]
    whole, split = gaps(times, counts), gaps(split_times, split_counts)
    assert [gap.tokens for gap in whole] == [gap.tokens for gap in split]
    assert [g.seconds for g in whole] == pytest.approx([g.seconds for g in split])


@given(st.integers(1, 20), st.integers(0, 60))
def test_tokens_are_spread_evenly_and_none_is_lost(chunks: int, total: int) -> None:
    counts = tokens_of([Piece(0.0, None)] * chunks, total)
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.integers(0, 9), min_size=1))
def test_a_running_count_is_believed(steps: list[int]) -> None:
    running = [sum(steps[: place + 1]) for place in range(len(steps))]
    assert tokens_of([Piece(0.0, count) for count in running], 999) == steps
