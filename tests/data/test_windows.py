"""Windows: stretches of endless streams that miss nothing, mixed by weight, packed and shuffled."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.data.support import DOCUMENTS, TOKENIZER, Numbered
from ziphius.data.encode import EncodedDocuments
from ziphius.data.randomness import draw
from ziphius.data.tokenizer import BOS, BOS_ID, EOS, EOS_ID, FIM_BEGIN, FIM_END, FIM_HOLE, PAD_ID
from ziphius.data.tokens import Tokens
from ziphius.data.windows import Stream, Window, WindowMaker, rows_per_epoch

sizes = st.lists(st.integers(2, 30), min_size=1, max_size=30)


def maker(sources: list[tuple[Tokens, float]], **changes: float) -> WindowMaker:
    given_ = {
        "sequence_length": 9,
        "seed": 0,
        "fim_rate": 0.0,
        "token_split_rate": 0.0,
        "window_tokens": 100,
    }
    return WindowMaker(sources, TOKENIZER, **{**given_, **changes})  # type: ignore[arg-type]


def rows_of(window: Window) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens and the documents of all rows."""
    tokens_BS = np.empty((window.rows, window.row), dtype=np.int64)
    documents_BS = np.empty((window.rows, window.row), dtype=np.int32)
    window.fill(0, tokens_BS, documents_BS)
    return tokens_BS.tolist(), documents_BS.tolist()


# Streams


@given(sizes=sizes, seed=st.integers(0, 2**40))
def test_every_epoch_is_every_document_once(sizes: list[int], seed: int) -> None:
    stream = Stream(Numbered(sizes), seed)
    documents, epochs = stream.between(0, 4 * stream.tokens_per_epoch)
    assert stream.tokens_per_epoch == sum(sizes)
    assert sorted(zip(epochs.tolist(), documents.tolist(), strict=True)) == [
        (epoch, document) for epoch in range(4) for document in range(len(sizes))
    ]
    assert epochs.tolist() == sorted(epochs.tolist())


@given(
    sizes=sizes,
    seed=st.integers(0, 2**40),
    borders=st.lists(st.integers(0, 300), min_size=2, max_size=8).map(sorted),
)
def test_stretches_that_touch_miss_nothing_and_repeat_nothing(
    sizes: list[int], seed: int, borders: list[int]
) -> None:
    stream = Stream(Numbered(sizes), seed)
    whole = np.stack(stream.between(borders[0], borders[-1]))
    parts = [np.stack(stream.between(a, b)) for a, b in itertools.pairwise(borders)]
    assert np.concatenate(parts, axis=1).tolist() == whole.tolist()


def test_a_stretch_has_the_documents_that_begin_in_it() -> None:
    source = Numbered([5, 3, 9, 4])
    stream = Stream(source, 0)
    order = stream.between(0, 21)[0]
    starts = np.cumsum(source.lengths[order]) - source.lengths[order]
    for start, stop in itertools.combinations(range(22), 2):
        expected = [d for d, at in zip(order, starts, strict=True) if start <= at < stop]
        assert stream.between(start, stop)[0].tolist() == expected
        later = stream.between(start + 21 * 3, stop + 21 * 3)
        assert set(later[1].tolist()) <= {3}


def test_order_depends_on_seed_epoch_and_keys_alone() -> None:
    source = Numbered([2] * 20)

    def orders(seed: int, source: Numbered = source) -> list[list[int]]:
        stream = Stream(source, seed)
        keys = source.keys[stream.between(0, 3 * stream.tokens_per_epoch)[0]]
        return keys.reshape(3, -1).tolist()

    assert len({tuple(order) for seed in (0, 1) for order in orders(seed)}) == 6
    # Other lengths and fewer documents leave the order of those that stay.
    fewer = Numbered([7] * 15)
    kept = set(fewer.keys.tolist())
    expected = [[key for key in order if key in kept] for order in orders(0)]
    assert orders(0, fewer) == expected
    hashes = draw("order", 0, 1, source.keys)
    assert orders(0)[1] == source.keys[np.argsort(hashes)].tolist()


def test_streams_may_be_read_in_any_order() -> None:
    stream = Stream(Numbered([3, 4, 5]), 0)
    forward = [stream.between(a, a + 7)[0].tolist() for a in range(0, 140, 7)]
    backward = [stream.between(a, a + 7)[0].tolist() for a in reversed(range(0, 140, 7))]
    assert forward == backward[::-1]


# Windows


@given(sizes=sizes, seed=st.integers(0, 2**40), row=st.integers(2, 20), number=st.integers(0, 5))
def test_a_windows_rows_are_its_documents(
    sizes: list[int], seed: int, row: int, number: int
) -> None:
    source = Numbered(sizes)
    window = maker([(source, 1.0)], sequence_length=row - 1, seed=seed, window_tokens=60).make(
        number
    )
    chosen = Stream(source, seed).between(60 * number, 60 * number + 60)[0]
    tokens, documents = rows_of(window)
    found = Counter(t for line in tokens for t in line)
    # Border tokens of a document that was cut are in two rows.
    repeats = 0
    for line, numbers in zip(tokens, documents, strict=True):
        assert len(line) == row
        end = numbers.index(-1) if -1 in numbers else row
        assert end > 0, "no row is empty"
        assert line[end:] == [PAD_ID] * (row - end)
        assert numbers[end:] == [-1] * (row - end)
        assert PAD_ID not in line[:end]
        assert numbers[:end] == sorted(numbers[:end])
        assert sorted(set(numbers[:end])) == list(range(numbers[end - 1] + 1))
        for _, group in itertools.groupby(zip(numbers[:end], line, strict=False), lambda p: p[0]):
            piece = [t for _, t in group]
            inside = piece[1:] if piece[0] == BOS_ID else piece
            assert inside == list(range(inside[0], inside[0] + len(inside)))
            repeats += piece[0] != BOS_ID
    expected = Counter(int(t) for i in chosen for t in source.document(i))
    assert found.pop(PAD_ID, 0) == round(window.padding * window.rows * row)
    assert set(found) == set(expected)
    assert found.total() == expected.total() + repeats


def test_rows_are_shuffled_by_seed_and_window() -> None:
    source = Numbered([31] * 30 + [6] * 150)

    def full(seed: int, number: int) -> list[int]:
        """Return which rows are one document; packing makes them first."""
        make = maker([(source, 1.0)], sequence_length=30, window_tokens=1830, seed=seed).make
        tokens, _ = rows_of(make(number))
        assert len(tokens) == 60
        return [i for i, row in enumerate(tokens) if row.count(BOS_ID) == 1]

    places = [full(seed, number) for seed in (0, 1) for number in (0, 1)]
    for some in places:
        assert len(some) == 30
        assert 8 < sum(i < 30 for i in some) < 22
    assert len(set(map(tuple, places))) == 4


def test_documents_in_a_row_are_shuffled() -> None:
    sizes = [3, 5, 6, 8, 10] * 30
    one, two = Numbered(sizes), Numbered(sizes, first=100_000, name="m")
    make = maker([(one, 1.0), (two, 1.0)], sequence_length=31, window_tokens=1920).make
    tokens, _ = rows_of(make(0))
    mixed = [
        [t >= 100_000 for t, before in zip(row[1:], row[:-1], strict=True) if before == BOS_ID]
        for row in tokens
    ]
    mixed = [row for row in mixed if len(set(row)) == 2]
    assert len(mixed) > len(tokens) / 2
    in_order = sum(row == sorted(row) for row in mixed) / len(mixed)
    assert 0.1 < in_order < 0.7, "a row does not have one source's documents first"


def test_short_documents_are_at_any_place_of_a_row() -> None:
    make = maker([(Numbered([4, 27] * 60), 1.0)], sequence_length=30, window_tokens=1860).make
    tokens, documents = rows_of(make(0))
    assert all(max(row) == 1 for row in documents)
    short_first = sum(row.count(0) == 4 for row in documents) / len(tokens)
    assert 0.25 < short_first < 0.75


@settings(max_examples=30)
@given(number=st.integers(0, 6), seed=st.integers(0, 2**20))
def test_a_window_is_a_function_of_its_number(number: int, seed: int) -> None:
    source = EncodedDocuments(DOCUMENTS, TOKENIZER)
    rates = {"fim_rate": 0.5, "token_split_rate": 0.5, "seed": seed}
    one, other = maker([(source, 1.0)], **rates), maker([(source, 1.0)], **rates)
    for n in range(number):
        other.make(n)
    assert rows_of(one.make(number)) == rows_of(other.make(number))


def test_a_small_sources_windows_are_its_epochs() -> None:
    source = Numbered([5, 8, 13, 4])
    make = maker([(source, 1.0)], window_tokens=30).make
    for number in range(4):
        tokens, _ = rows_of(make(number))
        assert {t for line in tokens for t in line} >= set(source.all_tokens())
        assert sum(line.count(BOS_ID) for line in tokens) == 4


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (0.2, 0.7)])
def test_sources_get_their_share_of_the_tokens(weights: tuple[float, float]) -> None:
    few, many = Numbered([7, 9, 4]), Numbered([11] * 300, first=100_000, name="m")
    sources = [(few, weights[0]), (many, weights[1])]
    make = maker(sources, sequence_length=50, window_tokens=2000).make
    share = weights[0] / sum(weights)
    got = np.zeros(2)
    for number in range(5):
        tokens = np.array(rows_of(make(number))[0]).flatten()
        counts = np.array([tokens_of(few, tokens), tokens_of(many, tokens)])
        assert abs(counts[0] / counts.sum() - share) < 0.02
        got += counts
    assert abs(got[0] / got.sum() - share) < 0.005


def tokens_of(source: Numbered, tokens: NDArray[np.int64]) -> int:
    """Count a source's tokens, and a BOS for each document that begins."""
    mine = np.array(source.all_tokens())
    return int(np.isin(tokens, mine).sum() + np.isin(tokens, source.begins).sum())


def test_a_document_longer_than_a_window_leaves_windows_empty() -> None:
    source = Numbered([95, 4])
    make = maker([(source, 1.0)], window_tokens=10).make
    windows = [make(number) for number in range(10)]
    assert [w.rows for w in windows].count(0) == 8
    assert all(w.padding == 0 for w in windows if not w.rows)
    assert rows_of(windows[[w.rows for w in windows].index(0)]) == ([], [])


def test_fim_and_splits_come_before_packing() -> None:
    source = EncodedDocuments(DOCUMENTS, TOKENIZER)
    window = maker(
        [(source, 1.0)],
        fim_rate=1.0,
        token_split_rate=1.0,
        sequence_length=400,
        window_tokens=int(source.lengths.sum()),
    ).make(0)
    tokens, _ = rows_of(window)
    texts = []
    for line in tokens:
        for part in TOKENIZER.decode(line, skip_special_tokens=False).split(BOS)[1:]:
            text = part.split(EOS)[0].removeprefix(FIM_BEGIN)
            prefix, rest = text.split(FIM_HOLE)
            suffix, middle = rest.split(FIM_END)
            texts.append(prefix + middle + suffix)
    assert sorted(texts) == sorted(document.text for document in DOCUMENTS)
    joined = TOKENIZER.encode(")\n").ids
    assert len(joined) == 1, "the tokenizer has a joined token"
    assert not any(joined[0] in line for line in tokens)
    assert sum(line.count(EOS_ID) for line in tokens) == len(DOCUMENTS)


def test_rows_per_epoch_are_those_of_the_only_window() -> None:
    source = Numbered([5, 8, 13, 4, 40, 9])
    window = maker([(source, 1.0)], window_tokens=79).make(0)
    assert rows_per_epoch([source], 10) == window.rows
