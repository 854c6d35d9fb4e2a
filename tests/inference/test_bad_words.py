"""A bad word never appears, however the text is cut; nothing else is forbidden."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ziphius.data.tokenizer import train_tokenizer
from ziphius.inference.bad_words import BadWords
from ziphius.inference.vocabulary import Vocabulary

TEXT = "whale whales wha hal ale aah ahah 🐋 鯨 " * 5
V = 310
WORDS = st.lists(
    st.text("whale ", min_size=1, max_size=6) | st.sampled_from(["🐋", "鯨 ", "haha", "aa"]),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(train_tokenizer([TEXT], V))


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


@settings(max_examples=100, deadline=None)
@given(words=WORDS, choices=st.lists(st.integers(0, 10**6), max_size=12), start=st.data())
def test_exactly_the_completing_tokens_are_forbidden(
    vocabulary: Vocabulary, words: list[str], choices: list[int], start: st.DataObject
) -> None:
    """At every step of a walk among the tokens that are left."""
    size = len(vocabulary.spellings)
    bad, output, text = BadWords(vocabulary, words, True), list[int](), b""
    # Tokens of the words' own letters, so that beginnings of words come about.
    likely = [t for t in range(size) if set(vocabulary.spell(t)) <= set("whale 🐋鯨".encode())]
    for choice in choices:
        banned = set(bad.banned(output).tolist())
        for token in range(size):
            after = text + vocabulary.text_bytes(token, True)
            completes = any(word.encode() in after for word in words)
            assert (token in banned) == completes, (output, token)
        left = [token for token in likely if token not in banned]
        if not left:
            break
        output.append(left[choice % len(left)])
        text += vocabulary.text_bytes(output[-1], True)
        assert not any(word in decode(vocabulary.tokenizer, output) for word in words)


def test_a_hidden_token_joins_what_is_around_it(vocabulary: Vocabulary) -> None:
    """With special tokens left out of the text, a word may go on after one."""
    a, b = (vocabulary.spellings.index(x) for x in (b"a", b"b"))
    control = min(vocabulary.special)
    assert b in BadWords(vocabulary, ["ab"], True).banned([a, control])
    assert b not in BadWords(vocabulary, ["ab"], False).banned([a, control])
    name = vocabulary.spell(control).decode()
    assert control not in BadWords(vocabulary, [name], True).banned([])
    assert control in BadWords(vocabulary, [name], False).banned([])
