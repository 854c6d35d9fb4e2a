"""A mixture that changes: which sources are read when, and that the run can stop anywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.support import TOKENIZER, Numbered
from ziphius.config.errors import BadInput
from ziphius.config.moment import WHOLE_RUN, moment_tokens
from ziphius.data.in_turn import InTurn, stretches
from ziphius.data.loader import Loader
from ziphius.data.rows import Batch

ROW = 8
FIRST = Numbered([20] * 30, first=1000, name="first")
SECOND = Numbered([20] * 30, first=10_000, name="second")


def loader(source: Numbered, seed: int = 0) -> Loader:
    return Loader([(source, 1.0)], TOKENIZER, sequence_length=ROW, seed=seed, workers=0)


def in_turn(at: int = 96) -> InTurn:
    return InTurn([(0, loader(FIRST)), (at, loader(SECOND))])


def of_first(batch: Batch) -> bool:
    tokens = batch.tokens_BS[batch.tokens_BS >= 1000]
    both = set((tokens < 10_000).tolist())
    assert len(both) == 1, "a batch is of one stream"
    return both.pop()


def test_each_has_its_turn_and_begins_at_its_beginning() -> None:
    stream = in_turn(96)
    batches = [stream.next_batch(4) for _ in range(8)]  # of 32 tokens each
    assert [of_first(batch) for batch in batches] == [True] * 3 + [False] * 5
    for source, own in ((FIRST, batches[:3]), (SECOND, batches[3:])):
        alone = loader(source)
        for batch in own:
            assert torch.equal(batch.tokens_BS, alone.next_batch(4).tokens_BS)


def test_a_batch_is_of_the_stream_of_its_first_token() -> None:
    stream = in_turn(97)
    assert [of_first(stream.next_batch(4)) for _ in range(5)] == [True] * 4 + [False]


@pytest.mark.parametrize("stop", range(8))
def test_it_goes_on_from_anywhere(stop: int) -> None:
    stream, again = in_turn(), in_turn()
    for _ in range(stop):
        stream.next_batch(4)
    again.load_state(json.loads(json.dumps(stream.state())))
    for _ in range(6):
        assert torch.equal(stream.next_batch(4).tokens_BS, again.next_batch(4).tokens_BS)


def test_the_state_of_other_turns_or_other_streams_is_refused() -> None:
    stream = in_turn()
    stream.next_batch(4)
    before = stream.state()
    others: list[dict[str, Any]] = [
        in_turn(128).state(),
        InTurn([(0, loader(FIRST)), (96, loader(SECOND, seed=1))]).state(),
        loader(FIRST).state(),
    ]
    for other in others:
        with pytest.raises(BadInput, match="loader state"):
            stream.load_state(other)
        assert stream.state() == before


def test_sources_begin_and_end() -> None:
    spans = [(0, "25%"), ("25%", "100%"), (100, 300), WHOLE_RUN]
    assert stretches(spans, 400) == [(0, [0, 3]), (100, [1, 2, 3]), (300, [1, 3])]
    assert stretches([WHOLE_RUN, WHOLE_RUN], 400) == [(0, [0, 1])]
    # What begins after the run, or ends after it, is no reason to begin anew.
    assert stretches([(0, 1000), (500, 1000)], 400) == [(0, [0])]


@pytest.mark.parametrize(
    ("spans", "where"),
    [([("10%", "100%")], "0"), ([(0, "50%"), ("60%", "100%")], "200"), ([(0, 399)], "399")],
)
def test_a_time_without_text_is_refused(spans: list[Any], where: str) -> None:
    with pytest.raises(BadInput, match=rf"none is read {where} tokens into the run of 400"):
        stretches(spans, 400)


SHARES = st.integers(0, 100).map(lambda share: f"{share}%")


@given(st.lists(st.tuples(SHARES, SHARES), max_size=5), st.integers(1, 5000))
def test_every_source_is_read_just_when_it_is_to_be(spans: list[Any], total: int) -> None:
    spans = [WHOLE_RUN, *spans]
    found = stretches(spans, total)
    begins = [begin for begin, _ in found]
    assert begins == sorted(set(begins))
    assert begins[0] == 0
    for (begin, active), end in zip(found, [*begins[1:], total], strict=True):
        for tokens in {begin, end - 1}:
            for place, (first, last) in enumerate(spans):
                read = moment_tokens(first, total) <= tokens < moment_tokens(last, total)
                assert read == (place in active)
