"""Text as it comes and where it ends: the same however tokens cut it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import EOS_ID, train_tokenizer
from ziphius.inference.params import SamplingParams
from ziphius.inference.stop import AnswerText, Finish
from ziphius.inference.vocabulary import Vocabulary

TEXT = "Zähle die Wale: 🐋🐳 鯨 нарвал, and whales are counted twice; whales dive. abab "
LENGTH = Finish("length")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(train_tokenizer([TEXT * 3], 340))


def answer(
    vocabulary: Vocabulary, ids: list[int], end_ids: tuple[int, ...] = (), **params: Any
) -> tuple[AnswerText, list[str]]:
    """Push tokens until the answer ends; end it by length where they do."""
    stream = AnswerText(vocabulary, SamplingParams(**{"max_tokens": None} | params), end_ids)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.finish:
            return stream, pieces
    return stream, [*pieces, stream.end(LENGTH)]


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """Return end, beginning and name of the stop that ends first, by trying every end."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return end, end - len(longest), longest
    return None


def cut(tokenizer: Tokenizer, text: str, places: list[int]) -> list[int]:
    """Tokenise a text in parts: another tokenisation of the same text."""
    edges = sorted({0, len(text), *(place for place in places if place < len(text))})
    parts = [text[a:b] for a, b in pairwise(edges)]
    return [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False).ids]


STOPS = st.lists(st.text("ab🐋é", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400)
@given(
    text=st.text("ab🐋é ", max_size=25),
    places=st.lists(st.integers(0, 25)),
    stops=STOPS,
    include=st.booleans(),
)
@example("aab", [1], ["ab"], False)
@example("aaba", [1], ["aaba", "ab"], False)
@example(" whales", [], ["les", "whal", "ha"], True)  # all inside one token
def test_any_tokenisation_gives_the_text_and_the_stop_of_the_whole(
    vocabulary: Vocabulary, text: str, places: list[int], stops: list[str], include: bool
) -> None:
    ids = cut(vocabulary.tokenizer, text, places)
    params = {"stop": stops, "include_stop_str_in_output": include}
    stream, pieces = answer(vocabulary, ids, **params)
    found = first_stop(text, stops)
    if found is None:
        assert ("".join(pieces), stream.finish) == (text, LENGTH)
    else:
        end, begin, stop = found
        assert "".join(pieces) == text[: end if include else begin]
        assert stream.finish == Finish("stop", stop)


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 339), max_size=25), stops=STOPS, skip=st.booleans())
def test_tokens_that_are_no_text(
    vocabulary: Vocabulary, ids: list[int], stops: list[str], skip: bool
) -> None:
    whole = vocabulary.tokenizer.decode(ids, skip_special_tokens=skip)
    stops = [*stops, "\ufffdx", "e"][: 1 + len(stops)]
    stream, pieces = answer(vocabulary, ids, stop=stops, skip_special_tokens=skip)
    found = first_stop(whole, stops)
    assert "".join(pieces) == (whole[: found[1]] if found else whole)
    assert stream.finish == (Finish("stop", found[2]) if found else LENGTH)


@settings(max_examples=200)
@given(text=st.text("ab🐋é ", max_size=25), stops=STOPS, places=st.lists(st.integers(0, 25)))
def test_text_is_held_only_as_long_as_needed(
    vocabulary: Vocabulary, text: str, stops: list[str], places: list[int]
) -> None:
    """What is held back is inside a character, or the longest beginning of a stop string."""
    ids = cut(vocabulary.tokenizer, text, places)
    stream = AnswerText(vocabulary, SamplingParams(stop=stops, max_tokens=None))
    shown, data = "", b""
    for token in ids:
        shown += stream.push(token)
        data += vocabulary.spell(token)
        if stream.finish:
            return
        final = data.decode("utf-8", "ignore")
        held = [n for n in range(len(final)) for s in stops if s.startswith(final[n:])]
        assert shown == final[: min(held, default=len(final))]


@settings(max_examples=200)
@given(
    text=st.text("ab🐋", min_size=1, max_size=20),
    places=st.lists(st.integers(0, 20)),
    stops=STOPS,
    include=st.booleans(),
)
def test_offsets_say_where_each_token_begins(
    vocabulary: Vocabulary, text: str, places: list[int], stops: list[str], include: bool
) -> None:
    ids = cut(vocabulary.tokenizer, text, places)
    stream, pieces = answer(vocabulary, ids, stop=stops, include_stop_str_in_output=include)
    shown = "".join(pieces)
    assert len(stream.offsets) <= len(ids)
    for place, offset in enumerate(stream.offsets):
        before = b"".join(vocabulary.spell(token) for token in ids[:place])
        assert offset == min(len(before.decode("utf-8", "ignore")), len(shown))


@settings(max_examples=200)
@given(
    text=st.text("ab", max_size=20),
    places=st.lists(st.integers(0, 20)),
    stop=st.text("ab", min_size=1, max_size=3),
    least=st.integers(0, 6),
)
def test_a_stop_within_the_least_tokens_does_not_count(
    vocabulary: Vocabulary, text: str, places: list[int], stop: str, least: int
) -> None:
    ids = cut(vocabulary.tokenizer, text, places)
    stream, pieces = answer(vocabulary, ids, stop=stop, min_tokens=least)
    ignored = len(vocabulary.tokenizer.decode(ids[:least]))
    ends = [n for n in range(ignored + 1, len(text) + 1) if text[:n].endswith(stop)]
    assert "".join(pieces) == (text[: ends[0] - len(stop)] if ends else text)
    assert (stream.finish == Finish("stop", stop)) == bool(ends)


def test_the_text_may_be_shorter_than_what_was_ignored(vocabulary: Vocabulary) -> None:
    """A match that reaches back into ignored text leaves out what was never shown."""
    ids = [vocabulary.spellings.index(b"a")] * 3
    stream, pieces = answer(vocabulary, ids, stop="aa", min_tokens=2)
    assert pieces == ["", "a", ""]
    assert stream.finish == Finish("stop", "aa")
    assert stream.offsets == [0, 1, 1]


# --- stop ids and lengths -------------------------------------------------------------------------


def ids_of(vocabulary: Vocabulary, text: str) -> list[int]:
    return list(vocabulary.tokenizer.encode(text, add_special_tokens=False).ids)


def test_the_end_token_has_no_text_and_no_name(vocabulary: Vocabulary) -> None:
    ids = [*ids_of(vocabulary, "whales"), EOS_ID, 300]
    stream, pieces = answer(vocabulary, ids, (EOS_ID,), skip_special_tokens=False)
    assert ("".join(pieces), stream.finish) == ("whales", Finish("stop"))
    assert len(stream.offsets) == len(ids) - 1
    assert stream.offsets[-1] == 6
    ignoring, pieces = answer(vocabulary, ids[:-1], (EOS_ID,), ignore_eos=True)
    assert ("".join(pieces), ignoring.finish) == ("whales", LENGTH)
    _, pieces = answer(
        vocabulary, ids, (EOS_ID,), skip_special_tokens=False, include_stop_str_in_output=True
    )
    assert "".join(pieces) == "whales" + vocabulary.spell(EOS_ID).decode()


def test_a_stop_id_is_named(vocabulary: Vocabulary) -> None:
    space = vocabulary.spellings.index(b" ")
    ids = [*ids_of(vocabulary, "a"), space, *ids_of(vocabulary, "b")]
    stream, pieces = answer(vocabulary, ids, stop_token_ids=[space])
    assert ("".join(pieces), stream.finish) == ("a", Finish("stop", space))
    stream, pieces = answer(vocabulary, ids, stop_token_ids=[space], ignore_eos=True)
    assert stream.finish == Finish("stop", space)
    _, pieces = answer(vocabulary, ids, stop_token_ids=[space], include_stop_str_in_output=True)
    assert "".join(pieces) == "a "


def test_what_was_held_is_shown_at_an_end(vocabulary: Vocabulary) -> None:
    ids = [*ids_of(vocabulary, "ab"), vocabulary.spellings.index(b"\xf0")]
    for last, finish in (([], LENGTH), ([EOS_ID], Finish("stop"))):
        stream, pieces = answer(vocabulary, [*ids, *last], (EOS_ID,), stop="abc")
        assert "".join(pieces) == "ab\ufffd"
        assert stream.finish == finish


def test_max_tokens_end_an_answer_unless_its_last_text_does(vocabulary: Vocabulary) -> None:
    ids = [vocabulary.spellings.index(b"a")] * 4
    stream, pieces = answer(vocabulary, ids, max_tokens=3)
    assert ("".join(pieces), stream.finish) == ("aaa", LENGTH)
    stream, pieces = answer(vocabulary, ids, max_tokens=3, stop="aaa")
    assert ("".join(pieces), stream.finish) == ("", Finish("stop", "aaa"))
    assert stream.end(LENGTH) == ""
    assert stream.finish == Finish("stop", "aaa")


def test_without_text_ids_and_lengths_still_end(vocabulary: Vocabulary) -> None:
    for spelled, params in ((vocabulary, {"detokenize": False}), (None, {})):
        stream = AnswerText(spelled, SamplingParams(max_tokens=2, **params), [EOS_ID])
        assert [stream.push(300), stream.push(301)] == ["", ""]
        assert stream.finish == LENGTH
        stream = AnswerText(spelled, SamplingParams(max_tokens=2, **params), [EOS_ID])
        stream.push(EOS_ID)
        assert stream.finish == Finish("stop")
    with pytest.raises(BadInput, match="stop strings need a tokenizer"):
        AnswerText(None, SamplingParams(stop="x"))
