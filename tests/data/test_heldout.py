"""Held-out rows: every token but the first is a target once; documents are chosen by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.support import DOCUMENTS, TOKENIZER
from ziphius.config.errors import BadInput
from ziphius.data.documents import Document
from ziphius.data.heldout import heldout_rows, select_heldout
from ziphius.data.tokenizer import BOS_ID, EOS_ID, token_bytes
from ziphius.kernels.loss import IGNORED


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


def test_without_documents_there_is_nothing_to_validate_on() -> None:
    with pytest.raises(BadInput, match="no held-out documents"):
        heldout_rows([], TOKENIZER, 4, 100)
