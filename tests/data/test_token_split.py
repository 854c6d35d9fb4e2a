"""The random split of tokens that join punctuation and line breaks."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.data.documents import Document
from ziphius.data.encode import EncodedDocuments
from ziphius.data.randomness import draw, happens
from ziphius.data.token_split import TokenSplit, joined_tokens
from ziphius.data.tokenizer import BOS_ID, EOS_ID, train_tokenizer

TEXTS = [
    "def f(x):\n    return (x)\n\n" * 9,
    "One.\r\nTwo;\nThree.\n\nFour。\nFive 。\n (\n" * 9,
    "  \n\n \n\t\n" * 9,
    'print("…")\n[\n' * 9,
]
TOKENIZER = train_tokenizer(TEXTS, 420)
TABLE = joined_tokens(TOKENIZER)


def is_joined(text: str) -> bool:
    """The definition of facts 6.1, branch c3 with a line break, by Python's own tables."""
    match = re.fullmatch(r" ?([^\r\n]+)[\r\n]+", text)
    return match is not None and all(unicodedata.category(c)[0] in "PS" for c in match[1])


def test_the_table_has_exactly_the_joined_tokens() -> None:
    joined = {
        index
        for index in range(20, TOKENIZER.get_vocab_size())  # without the special tokens
        if "\ufffd" not in (text := TOKENIZER.decode([index])) and is_joined(text)
    }
    assert set(TABLE) == joined
    texts = {TOKENIZER.decode([index]) for index in joined}
    assert {"):\n", ")\n\n", ".\r\n", "。\n", " 。\n"} <= texts


def test_parts_are_the_punctuation_and_the_line_breaks() -> None:
    for index, parts in TABLE.items():
        text = TOKENIZER.decode([index])
        assert TOKENIZER.decode(parts) == text
        breaks = text[len(text.rstrip("\r\n")) :]
        ids = TOKENIZER.encode(breaks).ids
        assert parts[-len(ids) :] == ids
        assert parts == TOKENIZER.encode(text[: -len(breaks)]).ids + ids
        assert not set(parts) & set(TABLE)
        assert spelled(parts) == spelled([index])


def spelled(ids: list[int]) -> str:
    """Return tokens as the vocabulary spells them, every byte as a character."""
    return "".join(TOKENIZER.id_to_token(index) for index in ids)


def split(
    documents: list[list[int]], rate: float, seed: int = 0, epoch: int = 0, first: int = 0
) -> list[list[int]]:
    """Apply the split to documents whose keys are their numbers from ``first`` on."""
    tokens = np.array([t for ids in documents for t in ids], dtype=np.int32)
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    keys = np.arange(first, first + len(documents), dtype=np.uint64)
    epochs = np.full(len(documents), epoch, dtype=np.int64)
    changed, sizes = TokenSplit(TOKENIZER, rate, seed).apply(tokens, lengths, keys, epochs)
    assert changed.dtype == np.int32
    assert sizes.dtype == np.int64
    assert sizes.sum() == len(changed)
    return [part.tolist() for part in np.split(changed, np.cumsum(sizes)[:-1])]


def slow_split(documents: list[list[int]], rate: float, seed: int, epoch: int) -> list[list[int]]:
    result = []
    for key, ids in enumerate(documents):
        new: list[int] = []
        for position, token in enumerate(ids):
            hashes = draw("split", seed, epoch, key, position)
            chosen = token in TABLE and bool(happens(hashes, rate)[0])
            new += TABLE[token] if chosen else [token]
        result.append(new)
    return result


token_lists = st.lists(
    st.lists(
        st.sampled_from(sorted(TABLE)) | st.integers(20, TOKENIZER.get_vocab_size() - 1),
        min_size=1,
        max_size=12,
    ),
    min_size=1,
    max_size=8,
)


@given(
    documents=token_lists,
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 9),
)
def test_it_equals_a_loop_over_the_tokens(
    documents: list[list[int]], rate: float, seed: int, epoch: int
) -> None:
    found = split(documents, rate, seed, epoch)
    assert found == slow_split(documents, rate, seed, epoch)
    for before, after in zip(documents, found, strict=True):
        assert TOKENIZER.decode(after) == TOKENIZER.decode(before)


def test_all_or_none_are_split_at_the_extremes() -> None:
    documents = [[BOS_ID, *TOKENIZER.encode(text).ids, EOS_ID] for text in TEXTS]
    assert split(documents, 0.0) == documents
    after = split(documents, 1.0)
    assert not any(set(ids) & set(TABLE) for ids in after)
    assert after != documents


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_occurrences_are_split_at_the_rate(rate: float) -> None:
    (token,) = TOKENIZER.encode("):\n").ids
    assert token in TABLE
    count = 8000
    kept = sum(ids.count(token) for ids in split([[token] * 80] * (count // 80), rate))
    assert abs(1 - kept / count - rate) <= 4 * (rate * (1 - rate) / count) ** 0.5


@settings(max_examples=30)
@given(cut=st.integers(1, 39), seed=st.integers(0, 2**20))
def test_a_documents_fate_does_not_depend_on_the_others(cut: int, seed: int) -> None:
    documents = [[BOS_ID, *TOKENIZER.encode(TEXTS[i % 4][i:]).ids, EOS_ID] for i in range(40)]
    whole = split(documents, 0.5, seed)
    assert split(documents[:cut], 0.5, seed) + split(documents[cut:], 0.5, seed, 0, cut) == whole


def test_seed_epoch_document_and_position_all_matter() -> None:
    (token,) = TOKENIZER.encode("):\n").ids
    documents = [[token] * 60] * 2
    variants = [split(documents, 0.5, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    halves = [tuple(ids) for variant in variants for ids in variant]
    assert len(set(halves)) == 8


def test_a_corpus_without_such_tokens_stays() -> None:
    tokenizer = train_tokenizer(["abc abc"], 300)
    assert joined_tokens(tokenizer) == {}
    source = EncodedDocuments([Document("a", "f(x):\n")], tokenizer)
    tokens, lengths = TokenSplit(tokenizer, 1.0, 0).apply(
        source.document(0), source.lengths, source.keys, np.zeros(1, dtype=np.int64)
    )
    assert tokens.tolist() == source.document(0).tolist()
    assert lengths.tolist() == source.lengths.tolist()
