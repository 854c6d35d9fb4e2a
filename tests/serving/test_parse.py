"""Reasoning, content and calls of an answer do not depend on how it was cut, and lose no text.

Tests about one answer are named after what users of other servers have met.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from tests.published import needs_published, published_folder
from tests.serving.answers import Step, answer, cut, encode, read, stream
from ziphius.data.tokenizer import EOS, EOS_ID, SPECIAL_TOKENS, load_tokenizer, train_tokenizer
from ziphius.inference.chat import ChatTemplate
from ziphius.inference.formats import FORMATS
from ziphius.inference.vocabulary import Vocabulary
from ziphius.serving.parse import SPELLINGS, Call, Markers, Parsed, Parser, Piece, collect

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
OUTPUT = "<｜tool▁output▁begin｜>"
TEXT = 'function dive {"metres": 3, "a": [true]}\n```json\n\n Größe 🐋 </think> hm Wal '


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(train_tokenizer([TEXT * 3], 330))


@pytest.fixture(scope="module")
def published() -> Vocabulary:
    return Vocabulary(load_tokenizer(published_folder()))


@pytest.fixture(scope="module")
def silent() -> Vocabulary:
    """A tokenizer whose marks are control tokens, which have no text."""
    tokenizer = train_tokenizer([TEXT * 3], 330)
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPELLINGS.values()])
    vocabulary = Vocabulary(tokenizer)
    assert encode(tokenizer, CALL)[0] in vocabulary.special
    return vocabulary


def parse(vocabulary: Vocabulary, text: str, stop: str | None = None, **how: Any) -> Parsed:
    """Return what is made of an answer, of one push; a push a token must give the same."""
    tokens = encode(vocabulary.tokenizer, text)
    steps = answer(vocabulary, tokens, stop=stop)
    markers = Markers.of(vocabulary.tokenizer)
    found = read(markers, steps, **how)
    whole = Step("", [], [])
    for step in steps:
        whole = Step(*(a + b for a, b in zip(whole, step, strict=True)))  # type: ignore[operator]
    assert read(markers, [whole], **how) == found
    assert found.called == bool(found.parsed.calls)
    return found.parsed


def fenced(name: str, arguments: str) -> str:
    return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{CALL_END}"


def plain(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEP}{arguments}{CALL_END}"


# --- laws -----------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32)
# Tokens that have meant trouble, among any others.
LIVELY = [
    *SPELLINGS.values(), "function", "\n", "\n\n", " ", "```json\n", "\n```", "`", "{", '"', "\\",
    "}", "dive", '{"a": 1}', "🐋", "é", EOS,
]  # fmt: skip


def draw_tokens(tokenizer: Tokenizer, chance: random.Random) -> list[int]:
    tokens = []
    for _ in range(chance.randrange(40)):
        if chance.random() < 0.8:
            spelled = encode(tokenizer, chance.choice(LIVELY))
            # Also halves of characters, and of what several tokens spell.
            tokens += spelled[: chance.choice([1, len(spelled), len(spelled)])]
        else:
            tokens.append(chance.randrange(tokenizer.get_vocab_size()))
    return [token for token in tokens if token != EOS_ID]


@settings(max_examples=400, deadline=None)
@given(SEEDS, st.booleans(), st.booleans(), st.booleans())
def test_any_cut_gives_the_same_message(
    vocabulary: Vocabulary,
    silent: Vocabulary,
    seed: int,
    in_reasoning: bool,
    split: bool,
    with_tools: bool,
) -> None:
    chance = random.Random(seed)
    used = chance.choice([vocabulary, silent])
    markers = Markers.of(used.tokenizer)
    options: dict[str, Any] = {"skip_special_tokens": chance.random() < 0.7}
    tokens = draw_tokens(used.tokenizer, chance)
    if chance.random() < 0.4:
        whole = "".join(step.text for step in answer(used, tokens, **options))
        place = chance.randrange(len(whole) + 1)
        if stop := whole[place : place + chance.randrange(1, 12)]:
            options |= {"stop": stop, "include_stop_str_in_output": chance.random() < 0.3}
    steps = answer(used, tokens, **options)
    how = {"in_reasoning": in_reasoning, "split_reasoning": split, "tools": with_tools}
    expected = read(markers, steps, **how)
    for _ in range(4):
        assert read(markers, cut(steps, chance), **how) == expected


@settings(max_examples=400, deadline=None)
@given(SEEDS, st.booleans())
def test_no_text_is_lost_and_no_mark_leaks(
    vocabulary: Vocabulary, seed: int, in_reasoning: bool
) -> None:
    """Letters keep their order over all pieces. Those of ``function`` and fences would be marks."""
    chance = random.Random(seed)
    tokenizer = vocabulary.tokenizer
    alphabet = [*SPELLINGS.values(), *'abxyz{}"\\ \n🐋', "ab xy"]
    text = "".join(chance.choice(alphabet) for _ in range(chance.randrange(40)))
    place = chance.randrange(len(text) + 1)
    stop = text[place : place + chance.randrange(1, 5)] if chance.random() < 0.5 else None
    steps = answer(vocabulary, encode(tokenizer, text), stop=stop or None)
    shown = "".join(step.text for step in steps)
    how = {"in_reasoning": in_reasoning}
    found = [
        p for step in stream(Markers.of(tokenizer), cut(steps, chance), **how)[0] for p in step
    ]
    for piece in found:
        assert piece.text or piece.kind == "call"
        if piece.kind in ("reasoning", "content"):
            assert not set(piece.text) & set("<｜>")
    assert bare("".join(piece.text for piece in found)) == bare(shown)


def bare(text: str) -> str:
    """Leave out blanks and marks, also one that is cut at the end."""
    for mark in SPELLINGS.values():
        text = text.replace(mark, "")
    return "".join(text.partition("<")[0].split())


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_nothing_is_held_back_without_a_reason(vocabulary: Vocabulary, seed: int) -> None:
    """What has been shown and is neither blank nor at a mark is given at once."""
    chance = random.Random(seed)
    tokenizer = vocabulary.tokenizer
    words = "".join(chance.choice(["hm ", "Wal\n", "Größe", "{"]) for _ in range(20))
    parser = Parser(Markers.of(tokenizer), in_reasoning=chance.random() < 0.5)
    shown = given_text = ""
    for step in answer(vocabulary, encode(tokenizer, words)):
        shown += step.text
        given_text += "".join(piece.text for piece in parser.push(*step))
        assert given_text == shown.rstrip()


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: not any(mark in text for mark in SPECIAL_TOKENS)
)
CLEAN = TEXTS.map(lambda text: text.strip(" \t\r\n"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS | st.sampled_from(list(SPELLINGS.values())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.builds(
    lambda value, ascii, indent: json.dumps(value, ensure_ascii=ascii, indent=indent),
    st.dictionaries(TEXTS, VALUES, max_size=3),
    st.booleans(),
    st.sampled_from([None, 2]),
)
NAMES = st.from_regex(r"[A-Za-z0-9_.:/-]{1,20}", fullmatch=True)
MESSAGES = st.tuples(CLEAN, CLEAN, st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3))


@needs_published
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), MESSAGES, SEEDS)
@example("v3", ("", "", [("function", '{"a": "`"}')]), 0)
@example("v3.1", ("hm", "", [("function", '{"```": "<｜tool▁call▁end｜>"}')]), 0)
@example("v3.1", ("", "", [("function", '{"a": 1}')]), 0)
@example("r1", ("hm", "    indented", [("a", "{}"), ("a", "{}")]), 0)
def test_a_rendered_message_comes_back(
    published: Vocabulary, name: str, message: tuple[str, str, list[tuple[str, str]]], seed: int
) -> None:
    """What a format writes for an assistant's turn, behind a prompt that asks for thinking."""
    reasoning, content, calls = message
    reasoning = "" if name == "v3" else reasoning
    template, user = ChatTemplate(format=name), {"role": "user", "content": "Hello"}
    said: dict[str, Any] = {"role": "assistant", "content": content}
    said["tool_calls"] = [{"function": {"name": n, "arguments": a}} for n, a in calls]
    form = FORMATS[name]
    head = ChatTemplate().render([user]) + form.earlier
    text = template.render([user, said], add_generation_prompt=False).removeprefix(head)
    if name == "r1":
        text = f"{reasoning}\n</think>\n\n{text}"
    elif name == "v3.1":
        text = f"{reasoning}</think>{text}"
    chance = random.Random(seed)
    steps = cut(answer(published, encode(published.tokenizer, text)), chance)
    found = read(Markers.of(published.tokenizer), steps, in_reasoning=name != "v3")
    assert found.parsed == Parsed(reasoning, content, tuple(Call(*call) for call in calls))


# --- what users have met --------------------------------------------------------------------------


def test_start_and_end_marker_in_one_delta(vocabulary: Vocabulary) -> None:
    """The call was lost, or its markup was shown."""
    parsed = parse(vocabulary, f"hm</think>Wal{CALLS}{fenced('dive', '{}')}{CALLS_END}{EOS}")
    assert parsed == Parsed("", "hmWal", (Call("dive", "{}"),))
    parsed = parse(vocabulary, f"<think>hm</think>Wal{CALLS}{plain('dive', '{}')}{CALLS_END}{EOS}")
    assert parsed == Parsed("hm", "Wal", (Call("dive", "{}"),))


def test_partial_pieces_of_a_mark_do_not_leak(vocabulary: Vocabulary) -> None:
    """Each mark is one token, so nothing is shown before it is certain; a spelling is text."""
    tokenizer = vocabulary.tokenizer
    letters = [encode(tokenizer, letter)[0] for letter in "</think>"]
    assert len(letters) == 8
    steps = answer(vocabulary, [*letters, *encode(tokenizer, "hm</think>Wal")])
    found = read(Markers.of(tokenizer), steps, in_reasoning=True).parsed
    assert found == Parsed("</think>hm", "Wal")


@pytest.mark.parametrize("spell", [fenced, plain])
def test_a_call_without_the_marker_that_begins_calls(vocabulary: Vocabulary, spell: Any) -> None:
    two = spell("dive", '{"metres": 3}') + "\n" + spell("a", "{}")
    expected = (Call("dive", '{"metres": 3}'), Call("a", "{}"))
    for text in (two, two + CALLS_END, f"{CALLS}{two}", f"{CALLS}{two}{CALLS_END}"):
        assert parse(vocabulary, text).calls == expected
        assert parse(vocabulary, f"Wal \n{text}\n") == Parsed("", "Wal", expected)


@pytest.mark.parametrize("spell", [fenced, plain])
def test_a_call_without_its_own_marker(vocabulary: Vocabulary, spell: Any) -> None:
    text = spell("dive", "{}").removeprefix(CALL)
    assert parse(vocabulary, f"{CALLS}\n{text}{CALLS_END}") == Parsed(calls=(Call("dive", "{}"),))
    assert parse(vocabulary, f"{CALLS}hm{fenced('dive', '{}')}") == Parsed(
        content="hm", calls=(Call("dive", "{}"),)
    )


def test_an_answer_does_not_end_up_in_the_reasoning(vocabulary: Vocabulary) -> None:
    for text in ("hm\n</think>\n\nWal", "<think>\nhm\n</think>\n\nWal", "hm</think>Wal"):
        assert parse(vocabulary, text, in_reasoning=True) == Parsed("hm", "Wal")
    assert parse(vocabulary, "Wal") == Parsed(content="Wal")
    assert parse(vocabulary, "hm", in_reasoning=True) == Parsed(reasoning="hm")
    assert parse(vocabulary, "</think>Wal", in_reasoning=True) == Parsed(content="Wal")
    assert parse(vocabulary, "\n <think>hm</think>\nWal") == Parsed("hm", "Wal")


def test_an_end_of_thinking_that_nothing_opened(vocabulary: Vocabulary) -> None:
    assert parse(vocabulary, "hm</think>Wal") == Parsed(content="hmWal")
    assert parse(vocabulary, "hm \n</think>\n\nWal") == Parsed(content="hm \nWal")


def test_thinking_goes_on_later(vocabulary: Vocabulary) -> None:
    found = parse(vocabulary, "<think>a</think>b\n\n<think>\nc</think>\n\nd")
    assert found == Parsed("ac", "b\n\nd")


def test_end_of_sentence_does_not_leak(vocabulary: Vocabulary) -> None:
    assert parse(vocabulary, f"hm</think>Wal{EOS}", in_reasoning=True) == Parsed("hm", "Wal")


def test_no_json_prefix_and_no_fence_in_arguments(vocabulary: Vocabulary) -> None:
    for inner in (
        '```json\n{"a": 1}\n```',
        '```\n{"a": 1}```\n',
        '\n{"a": 1}\n',
        '```json{"a": 1}',
    ):
        for head in (f"{CALL}dive{SEP}", f"{CALL}function{SEP}dive\n", f"{CALL}function{SEP}dive"):
            found = parse(vocabulary, f"{head}{inner}{CALL_END}")
            if inner[0] != "\n" or not head.endswith("dive"):
                assert found == Parsed(calls=(Call("dive", '{"a": 1}'),)), head + inner
    fence = '{"code": "```json\\n```"}'
    for spell in (fenced, plain):
        assert parse(vocabulary, spell("dive", fence)).calls == (Call("dive", fence),)


def test_calls_do_not_leak_where_there_are_no_tools(vocabulary: Vocabulary) -> None:
    """With ``tool_choice`` none the marks can't come; if they do, they are not shown."""
    found = parse(vocabulary, f"Wal{CALLS}{plain('dive', '{}')}{CALLS_END}", tools=False)
    assert found == Parsed(content="Waldive{}")


@pytest.mark.parametrize("spell", [fenced, plain])
@pytest.mark.parametrize("in_reasoning", [False, True])
def test_an_answer_cut_by_its_length_gives_what_is_there(
    vocabulary: Vocabulary, spell: Any, in_reasoning: bool
) -> None:
    arguments = '{"metres": 3, "a": " Wal "}'
    tokens = encode(vocabulary.tokenizer, f"Wal {CALLS}{spell('dive', arguments)}{CALLS_END}")
    markers = Markers.of(vocabulary.tokenizer)
    seen = set()
    for size in range(len(tokens)):
        found = read(markers, answer(vocabulary, tokens[:size]), in_reasoning=in_reasoning).parsed
        text = found.reasoning + found.content
        assert "Wal ".startswith(text)
        for made in found.calls:
            assert "dive".startswith(made.name)
            assert made.name
            assert arguments.startswith(made.arguments)
            seen.add(made.arguments)
    assert {"", arguments} < seen
    assert len(seen) > 5


@pytest.mark.parametrize("spell", [fenced, plain])
def test_a_string_cut_by_the_length_keeps_its_end(vocabulary: Vocabulary, spell: Any) -> None:
    """Blanks and a fence inside a string are its own."""
    for arguments in ('{"a": "hm \n', '{"a": "hm```', '{"a": "```json\n'):
        text = spell("dive", arguments).partition(arguments)[0] + arguments
        assert parse(vocabulary, text).calls == (Call("dive", arguments),)


def test_calls_in_the_middle_of_reasoning(vocabulary: Vocabulary) -> None:
    text = f"hm{CALLS}{plain('dive', '{}')}{CALLS_END}a</think>Wal"
    found = parse(vocabulary, text, in_reasoning=True)
    assert found == Parsed("hma", "Wal", (Call("dive", "{}"),))


@pytest.mark.parametrize("spell", [fenced, plain])
@pytest.mark.parametrize("mark", list(SPELLINGS.values()))
def test_markers_inside_arguments(vocabulary: Vocabulary, spell: Any, mark: str) -> None:
    """A file about these very tokens, written by a tool."""
    arguments = json.dumps({"a": f"{mark} {mark}", "Wal": mark}, ensure_ascii=False)
    found = parse(vocabulary, f"{CALLS}{spell('dive', arguments)}\n{spell('a', '{}')}{CALLS_END}")
    assert found == Parsed(calls=(Call("dive", arguments), Call("a", "{}")))


def test_a_string_of_the_arguments_that_is_never_closed(vocabulary: Vocabulary) -> None:
    found = parse(vocabulary, f"{CALLS}{plain('dive', chr(123) + chr(34) + 'hm')}{CALLS_END}{EOS}")
    assert found == Parsed(calls=(Call("dive", '{"hm'),))


def test_a_model_that_goes_on_with_outputs_of_its_own(vocabulary: Vocabulary) -> None:
    text = f"{CALLS}{CALL}dive{SEP}{{}}{OUTPUT}wet"
    assert parse(vocabulary, text) == Parsed(content="wet", calls=(Call("dive", "{}"),))


def test_a_name_without_a_separator(vocabulary: Vocabulary) -> None:
    for inner in ('dive{"a": 1}', 'dive\n{"a": 1}', 'dive\n```json\n{"a": 1}\n```'):
        found = parse(vocabulary, f"{CALL}{inner}{CALL_END}")
        assert found == Parsed(calls=(Call("dive", '{"a": 1}'),))
    assert parse(vocabulary, f"{CALL}function{CALL_END}") == Parsed()


def test_blanks_of_an_answer_without_marks_are_its_own(vocabulary: Vocabulary) -> None:
    for text in ("  Wal \n", " ", "\n\nWal", ""):
        assert parse(vocabulary, text) == Parsed(content=text)
    assert parse(vocabulary, "</think>\n\n    Wal", in_reasoning=True).content == "    Wal"


def test_reasoning_that_is_not_split_stays_as_it_is(vocabulary: Vocabulary) -> None:
    text = "\nhm\n</think>\n\nWal"
    found = parse(vocabulary, text, in_reasoning=True, split_reasoning=False)
    assert found == Parsed(content=text)


def test_a_stop_string_inside_a_marker(vocabulary: Vocabulary) -> None:
    """The text ends inside the mark: nothing of it is shown."""
    assert parse(vocabulary, "hm</think>Wal", "ink>", in_reasoning=True) == Parsed("hm")
    assert parse(vocabulary, "hm</think>Wal", "k>W", in_reasoning=True) == Parsed("hm")
    assert parse(vocabulary, "hm</think>Wal", "hm<", in_reasoning=True) == Parsed()
    assert parse(vocabulary, "hm</think>Wal", "al", in_reasoning=True) == Parsed("hm", "W")


def test_half_a_character_before_a_marker(vocabulary: Vocabulary) -> None:
    tokenizer = vocabulary.tokenizer
    whale = [vocabulary.spellings.index(bytes([byte])) for byte in "🐋".encode()]
    steps = answer(vocabulary, [*whale[:2], *encode(tokenizer, "</think>"), *whale])
    found = read(Markers.of(tokenizer), steps, in_reasoning=True).parsed
    assert found == Parsed("\ufffd", "🐋")


# --- pieces ---------------------------------------------------------------------------------------


def test_pieces_as_a_client_streams_them(vocabulary: Vocabulary) -> None:
    text = f"<think>hm</think>Wal{CALLS}{fenced('dive', '{}')}{CALLS_END}{EOS}"
    steps = answer(vocabulary, encode(vocabulary.tokenizer, text))
    pieces, _ = stream(Markers.of(vocabulary.tokenizer), steps)
    found = [piece for step in pieces for piece in step]
    kinds = list(dict.fromkeys((piece.kind, piece.call) for piece in found))
    assert kinds == [("reasoning", None), ("content", None), ("call", 0), ("arguments", 0)]
    assert [p.text for p in found if p.kind == "call"] == ["dive"]
    assert collect(found) == Parsed("hm", "Wal", (Call("dive", "{}"),))
    together = [Piece("content", "a"), Piece("call", "x", 0), Piece("content", "b")]
    assert collect(together) == Parsed("", "ab", (Call("x", ""),))


@pytest.mark.parametrize(
    ("text", "in_reasoning", "count"),
    [
        ("Wal", False, 0),
        ("aaa</think>Wal", True, 4),
        ("<think>aaa</think>Wal", False, 5),
        ("<think>aaa", True, 4),
        ("aa</think>Wal", False, 0),
        (f"aa{CALLS}{CALL}a{SEP}{{}}{CALL_END}{CALLS_END}a</think>Wal", True, 4),
    ],
)
def test_reasoning_tokens_are_counted(
    vocabulary: Vocabulary, text: str, in_reasoning: bool, count: int
) -> None:
    """With the tags that are in the answer, and without calls."""
    tokenizer = vocabulary.tokenizer
    tokens = [t for part in split_marks(text) for t in encode(tokenizer, part)]
    found = read(Markers.of(tokenizer), answer(vocabulary, tokens), in_reasoning=in_reasoning)
    assert found.reasoning_tokens == count


def split_marks(text: str) -> list[str]:
    """Cut a text into its marks and single letters, a token each."""
    parts, place = [], 0
    while place < len(text):
        mark = next((m for m in SPELLINGS.values() if text.startswith(m, place)), text[place])
        parts.append(mark)
        place += len(mark)
    return parts


def test_which_marks_a_tokenizer_has(vocabulary: Vocabulary) -> None:
    markers = Markers.of(vocabulary.tokenizer)
    assert len(markers.names) == len(SPELLINGS) == 11
    assert markers.think == SPECIAL_TOKENS.index("<think>")
    none = Markers.of(Tokenizer.from_str(without_marks(vocabulary)))
    assert none == Markers()
    steps = answer(vocabulary, encode(vocabulary.tokenizer, "hm</think>Wal"))
    assert read(none, steps).parsed == Parsed(content="hm</think>Wal")


def without_marks(vocabulary: Vocabulary) -> str:
    whole = json.loads(vocabulary.tokenizer.to_str())
    return json.dumps(whole | {"added_tokens": []})


@needs_published
def test_the_published_marks() -> None:
    markers = Markers.of(load_tokenizer(published_folder()))
    assert (markers.think, markers.end_think, markers.separator) == (128_798, 128_799, 128_814)
    assert (markers.calls_begin, markers.call_end) == (128_806, 128_809)
