"""The loader: every token once an epoch, an order by name alone, and the same batches on resume."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.data.corpus import Document
from ziphius.data.loader import Loader, heldout_rows, select_heldout
from ziphius.data.tokenizer import BOS_ID, EOS, EOS_ID, token_bytes, train_tokenizer
from ziphius.kernels.loss import IGNORED

DOCUMENTS = [
    Document(f"package{i}/module.py", f"document {i}: " + "whale dives deep, " * (i % 5) + "\n")
    for i in range(12)
]
TOKENIZER = train_tokenizer([document.text for document in DOCUMENTS], 320)


def make(
    documents: list[Document] = DOCUMENTS,
    *,
    sequence_length: int = 7,
    batch_size: int = 3,
    seed: int = 0,
    tokenizer: Tokenizer = TOKENIZER,
) -> Loader:
    return Loader(
        documents, tokenizer, sequence_length=sequence_length, batch_size=batch_size, seed=seed
    )


def stream_of(loader: Loader, tokens: int) -> list[int]:
    """Read the first tokens of the stream that rows are cut from."""
    return loader.stream(0, tokens).tolist()


def split_documents(stream: list[int]) -> list[str]:
    """Return the texts between BOS and EOS."""
    found, rest = [], stream
    while rest:
        assert rest[0] == BOS_ID
        end = rest.index(EOS_ID)
        found.append(TOKENIZER.decode(rest[1:end]))
        rest = rest[end + 1 :]
    return found


def test_batches_have_the_promised_shape_and_type() -> None:
    batch = make().next_batch()
    assert batch.shape == (3, 8)
    assert batch.dtype == torch.int64
    assert batch.device.type == "cpu"
    assert batch.is_contiguous()


@settings(max_examples=40, deadline=None)
@given(
    sequence_length=st.integers(2, 40),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    count=st.integers(1, 12),
)
def test_every_epoch_is_every_document_once(
    sequence_length: int, batch_size: int, seed: int, count: int
) -> None:
    documents = DOCUMENTS[:count]
    loader = make(documents, sequence_length=sequence_length, batch_size=batch_size, seed=seed)
    length = sum(len(TOKENIZER.encode(document.text).ids) + 2 for document in documents)
    assert loader.tokens_per_epoch == length
    stream = stream_of(loader, 3 * length)
    texts = sorted(document.text for document in documents)
    for epoch in range(3):
        assert sorted(split_documents(stream[epoch * length : (epoch + 1) * length])) == texts


def test_order_depends_on_seed_and_epoch() -> None:
    length = make().tokens_per_epoch

    def orders(seed: int) -> list[tuple[str, ...]]:
        stream = stream_of(make(seed=seed), 3 * length)
        return [tuple(split_documents(stream[e * length : (e + 1) * length])) for e in range(3)]

    assert len({*orders(0), *orders(1)}) == 6


def test_order_depends_on_names_alone() -> None:
    length = make().tokens_per_epoch
    base = stream_of(make(), 2 * length)
    assert stream_of(make(DOCUMENTS[::-1]), 2 * length) == base
    assert make(DOCUMENTS[::-1]).state() == make().state()
    # Without one document, the others keep their relative order.
    fewer = make(DOCUMENTS[1:])
    texts = split_documents(stream_of(fewer, fewer.tokens_per_epoch))
    whole = split_documents(base[:length])
    assert texts == [text for text in whole if text != DOCUMENTS[0].text]


@settings(max_examples=40, deadline=None)
@given(
    stop=st.integers(0, 60),
    shape=st.tuples(st.integers(2, 30), st.integers(1, 6)),
    seed=st.integers(0, 2**40),
)
def test_a_restored_loader_goes_on_with_the_same_batches(
    stop: int, shape: tuple[int, int], seed: int
) -> None:
    first = make(sequence_length=shape[0], batch_size=shape[1], seed=seed)
    for _ in range(stop):
        first.next_batch()
    state = json.loads(json.dumps(first.state()))
    assert all(type(value) is int for value in state.values())
    second = make(sequence_length=shape[0], batch_size=shape[1], seed=seed)
    second.load_state(state)
    assert second.state() == first.state()
    for _ in range(20):
        assert torch.equal(first.next_batch(), second.next_batch())


@settings(max_examples=40, deadline=None)
@given(sequence_length=st.integers(2, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_every_row_of_the_stream_is_dealt_once(
    sequence_length: int, batch_size: int, seed: int
) -> None:
    loader = make(sequence_length=sequence_length, batch_size=batch_size, seed=seed)
    window = max(1, loader.tokens_per_epoch // sequence_length)
    dealt: list[list[int]] = []
    while len(dealt) < 2 * window:
        dealt += loader.next_batch().tolist()
    for w in range(2):
        starts = range(w * window * sequence_length, (w + 1) * window * sequence_length)
        rows = [loader.stream(i, sequence_length + 1).tolist() for i in starts[::sequence_length]]
        assert sorted(dealt[w * window : (w + 1) * window]) == sorted(rows)


def test_rows_of_a_batch_are_no_neighbours() -> None:
    loader = make(sequence_length=4, batch_size=8)
    rows = [loader.stream(4 * i, 5).tolist() for i in range(loader.tokens_per_epoch // 4)]
    batches = [loader.next_batch().tolist() for _ in range(3)]
    places = [rows.index(row) for batch in batches for row in batch]
    steps = [b - a for a, b in itertools.pairwise(places)]
    assert steps.count(1) < len(steps) // 4
    assert max(places) - min(places) > len(rows) // 2


def test_state_outlives_a_change_of_batch_size() -> None:
    first = make(batch_size=4)
    first.next_batch()
    second = make(batch_size=2)
    second.load_state(first.state())
    expected = first.next_batch()
    assert torch.equal(torch.cat([second.next_batch(), second.next_batch()]), expected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make(seed=1), "seed differs"),
        (lambda: make(sequence_length=8), "sequence_length differs"),
        (lambda: make(DOCUMENTS[1:]), "tokens_per_epoch, fingerprint differs"),
        (
            lambda: make([*DOCUMENTS[1:], Document("package0/other.py", DOCUMENTS[0].text)]),
            "fingerprint differs",
        ),
        (lambda: make(tokenizer=train_tokenizer(["aa"], 300)), "fingerprint differs"),
    ],
)
def test_the_state_of_another_stream_is_refused(other, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput, match=message) as error:
        make().load_state(other().state())
    assert "\n" not in str(error.value)


def test_an_incomplete_state_is_refused() -> None:
    with pytest.raises(BadInput, match="not complete"):
        make().load_state({"rows_dealt": 3})


def test_control_tokens_spelt_out_in_a_text_end_no_document() -> None:
    loader = make([Document("a.txt", f"one{EOS}two")], sequence_length=60)
    stream = stream_of(loader, loader.tokens_per_epoch)
    assert stream.count(EOS_ID) == 1
    assert split_documents(stream) == [f"one{EOS}two"]


def test_progress_counts_documents() -> None:
    seen: list[tuple[int, int]] = []
    documents = [Document(f"{i}.txt", "x") for i in range(150)]
    Loader(
        documents,
        TOKENIZER,
        sequence_length=4,
        batch_size=1,
        seed=0,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (150, 150)
    assert len(seen) > 1
    assert all(a < b for a, b in itertools.pairwise(seen))


@settings(max_examples=60, deadline=None)
@given(sequence_length=st.integers(1, 50), max_bytes=st.integers(1, 900))
def test_heldout_targets_are_each_token_but_the_first_once(
    sequence_length: int, max_bytes: int
) -> None:
    rows = heldout_rows(DOCUMENTS[::-1], TOKENIZER, sequence_length, max_bytes)
    chosen = select_heldout(DOCUMENTS, max_bytes)
    stream = [
        token
        for document in chosen
        for token in (BOS_ID, *TOKENIZER.encode(document.text).ids, EOS_ID)
    ]
    kept = rows.targets_MT.flatten() != IGNORED
    assert rows.tokens_MT.shape == rows.targets_MT.shape
    assert rows.tokens_MT.shape[1] == sequence_length
    assert rows.targets_MT.flatten()[kept].tolist() == stream[1:]
    assert rows.tokens_MT.flatten()[kept].tolist() == stream[:-1]
    assert (rows.tokens_MT.flatten()[~kept] == EOS_ID).all()
    assert (~kept).sum() < sequence_length, "no row is only filling"
    sizes = token_bytes(TOKENIZER)
    assert sizes[rows.targets_MT.flatten()[kept].numpy()].sum() == rows.bytes
    assert rows.bytes == sum(len(document.text.encode()) for document in chosen)


def test_heldout_text_is_cut_between_documents() -> None:
    documents = [Document("b", "22222"), Document("a", "111"), Document("c", "3")]

    def chosen(max_bytes: int) -> list[str]:
        return [document.text for document in select_heldout(documents, max_bytes)]

    assert chosen(3) == chosen(7) == ["111"]
    assert chosen(8) == ["111", "22222"]
    assert chosen(9) == ["111", "22222", "3"]


def test_a_first_document_too_long_is_cut_at_a_character() -> None:
    documents = [Document("a", "日本語"), Document("b", "x")]

    def text(size: int) -> str:
        (document,) = select_heldout(documents, size)
        return document.text

    assert [text(size) for size in (1, 3, 5, 6, 8)] == ["日", "日", "日", "日本", "日本"]
    assert heldout_rows(documents, TOKENIZER, 4, 7).bytes == 6


def test_without_documents_there_is_nothing_to_load() -> None:
    with pytest.raises(BadInput, match="no documents"):
        make([])
    with pytest.raises(BadInput, match="no held-out documents"):
        heldout_rows([], TOKENIZER, 4, 100)


def test_rows_longer_than_an_epoch_run_through_several() -> None:
    documents = [Document("a.txt", "x")]
    batch = make(documents, sequence_length=8, batch_size=1).next_batch()
    epoch = [BOS_ID, *TOKENIZER.encode("x").ids, EOS_ID]
    assert batch.tolist() == [(epoch * 3)[:9]]
    assert np.array_equal(stream_of(make(documents), 30), epoch * 10)
