"""Documents in memory: encoded as they are, found again by name, told apart."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.support import DOCUMENTS, TOKENIZER
from ziphius.config.errors import BadInput
from ziphius.data.documents import Document
from ziphius.data.encode import EncodedDocuments, encode
from ziphius.data.tokenizer import (
    BOS_ID,
    EOS_ID,
    SPECIAL_TOKENS,
    train_tokenizer,
)
from ziphius.data.tokens import Tokens, document_keys


def test_each_document_is_bos_its_tokens_eos() -> None:
    source: Tokens = EncodedDocuments(DOCUMENTS[::-1], TOKENIZER)
    ordered = sorted(DOCUMENTS, key=lambda document: document.name)
    assert source.lengths.dtype == np.int64
    assert len(source.lengths) == len(ordered)
    for i, document in enumerate(ordered):
        ids = source.document(i)
        assert ids.dtype == np.int32
        assert ids.tolist() == [BOS_ID, *TOKENIZER.encode(document.text).ids, EOS_ID]
        assert len(ids) == source.lengths[i]


def test_a_key_is_the_beginning_of_the_names_sha256() -> None:
    keys = EncodedDocuments(DOCUMENTS, TOKENIZER).keys
    names = sorted(document.name for document in DOCUMENTS)
    assert keys.dtype == np.uint64
    assert keys.tolist() == [
        int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) for name in names
    ]
    assert len(document_keys(["\udcff"])) == 1, "a file name that is not UTF-8"
    assert document_keys([]).tolist() == []


@given(
    text=st.lists(
        st.sampled_from([*SPECIAL_TOKENS, "a", " b", "\n", "<", "｜>", "日"]), max_size=10
    ).map("".join)
)
def test_special_tokens_spelt_out_in_a_text_stay_text(text: str) -> None:
    (ids,) = encode([Document("a", text)], TOKENIZER)
    inside = ids[1:-1].tolist()
    assert not set(inside) & set(range(len(SPECIAL_TOKENS)))
    assert TOKENIZER.decode(inside) == text


def test_many_documents_are_encoded_in_order() -> None:
    documents = [Document(str(i), f"{i} whales") for i in range(200)]
    found = [TOKENIZER.decode(ids[1:-1]) for ids in encode(iter(documents), TOKENIZER)]
    assert found == [document.text for document in documents]


def test_progress_counts_documents() -> None:
    seen: list[tuple[int, int]] = []
    documents = [Document(f"{i}.txt", "x") for i in range(150)]
    EncodedDocuments(documents, TOKENIZER, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (150, 150)
    assert len(seen) > 1
    assert all(a < b for a, b in itertools.pairwise(seen))


def test_the_fingerprint_tells_names_texts_and_tokenizers_apart() -> None:
    base = [Document("a", "one"), Document("b", "two")]

    def fingerprint(documents: list[Document], tokenizer=TOKENIZER) -> int:  # type: ignore[no-untyped-def]
        return EncodedDocuments(documents, tokenizer).fingerprint

    others = [
        fingerprint(base),
        fingerprint([Document("c", "one"), Document("b", "two")]),
        fingerprint([Document("a", "one"), Document("b", "twö")]),
        fingerprint(base[:1]),
        fingerprint([Document("ab", "one"), Document("", "two")]),
        fingerprint(base, train_tokenizer(["one two " * 9], 300)),
    ]
    assert len(set(others)) == len(others)
    assert fingerprint(base[::-1]) == others[0]
    assert all(0 <= value < 2**48 for value in others)


def test_no_documents_are_no_tokens() -> None:
    source = EncodedDocuments([], TOKENIZER)
    assert source.lengths.tolist() == source.keys.tolist() == []


def test_half_a_surrogate_pair_is_told_in_one_line() -> None:
    documents = [Document("good.txt", "a"), Document("bad.jsonl#3", "ab\ud83d")]
    with pytest.raises(BadInput, match=r"bad\.jsonl#3: character 2 is half") as error:
        EncodedDocuments(documents, TOKENIZER)
    assert "\n" not in str(error.value)
