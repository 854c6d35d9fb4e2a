"""Events of a stream, however they are cut and whatever they hold."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.bench.mock import DONE, chunk, event, good, usage
from ziphius.serving.bench.stream import Reader, message_of, one_line


def read(*pieces: bytes) -> Reader:
    """Read pieces that come a second apart."""
    reader = Reader()
    for at, piece in enumerate(pieces):
        reader.feed(float(at), piece)
    reader.end()
    return reader


def state(reader: Reader) -> tuple[Any, ...]:
    fields = (reader.text, reader.finish_reason, reader.usage, reader.done, reader.fault)
    return (*fields, [piece.tokens for piece in reader.pieces])


def whole() -> bytes:
    pieces = [p if isinstance(p, bytes) else p[1] for p in good(["Wal", "fisch 🐋", "\n"]).pieces]
    return b": a comment\n\n" + b"".join(pieces)


@given(st.lists(st.integers(0, len(whole())), max_size=6), st.booleans())
def test_cuts_and_line_ends_change_nothing(places: list[int], crlf: bool) -> None:
    data = whole().replace(b"\n", b"\r\n") if crlf else whole()
    cuts = sorted({0, *(p for p in places), len(data)})
    pieces = [data[a:b] for a, b in pairwise(cuts)]
    assert state(read(*pieces)) == state(read(whole()))
    assert read(*pieces).text == "Wal fisch 🐋 \n "


def test_a_stream_in_order() -> None:
    reader = read(
        chunk("a", **usage(1)), chunk("b", **usage(3)), chunk(None, finish="length"), DONE
    )
    assert [(p.at, p.tokens) for p in reader.pieces] == [(0.0, 1), (1.0, 3)]
    assert (reader.finish_reason, reader.finished_at, reader.done) == ("length", 2.0, True)
    assert reader.fault is None


def test_a_chunk_without_text_is_no_token() -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    assert [p.at for p in read(role, chunk("a")).pieces] == [1.0]


@pytest.mark.parametrize("names", [("reasoning",), ("reasoning_content",), None])
def test_reasoning_and_tool_calls_are_text(names: tuple[str, ...] | None) -> None:
    names = names or ("reasoning", "reasoning_content")
    call = {"index": 0, "id": "call-7", "function": {"name": "dive", "arguments": '{"m": 3}'}}
    deltas: list[dict[str, Any]] = [
        dict.fromkeys(names, "think "), {"content": "said"}, {"tool_calls": [call]}
    ]  # fmt: skip
    reader = read(*(event({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas))
    assert reader.text == 'think \0said\0dive{"m": 3}'
    assert len(reader.pieces) == 3


def test_an_empty_finish_reason_is_none() -> None:
    assert read(chunk("a", finish="")).finish_reason is None


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        (b"data: {oops\n\n", "malformed", "{oops"),
        (b"data: 7\n\n", "malformed", "no object"),
        (event({"object": "chunk"}), "malformed", "choices"),
        (event({"choices": ["text"]}), "malformed", "choices"),
        (event({"error": {"message": "out of\nmemory", "code": 500}}), "error", "out of memory"),
        (event({"error": "flat"}), "error", "flat"),
    ],
)
def test_what_must_not_be_sent(data: bytes, kind: str, said: str) -> None:
    reader = read(chunk("a"), data, chunk("b"))
    assert reader.fault is not None
    assert reader.fault.kind == kind
    assert said in reader.fault.message
    assert "\n" not in reader.fault.message
    assert reader.text == "a", "what follows a fault is no answer"


def test_half_an_event_at_the_end_is_none_and_the_mark_may_end_there() -> None:
    assert read(b'data: {"choices": [{"text": "a"').fault is None
    assert read(b"data: [DONE]").done
    assert read(b"data: [DONE]\n").done
    assert not read(b"data: [DO").done


NAMES = st.sampled_from(
    ("choices", "delta", "content", "text", "usage", "error", "tool_calls", "completion_tokens")
)


@given(
    st.recursive(
        st.none() | st.text(max_size=5) | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner),
    )
)
def test_no_json_breaks_the_reader(payload: Any) -> None:
    read(b"data: " + json.dumps(payload).encode() + b"\n\n")
    read(event({"choices": [payload], "usage": payload}))
    read(event({"choices": [{"delta": payload, "finish_reason": payload}]}))


def test_messages_are_one_short_line() -> None:
    assert message_of({"error": {"message": "no\nroom"}}) == "no room"
    assert message_of({"detail": [{"loc": "x"}]}) == "[{'loc': 'x'}]"
    assert message_of({"error": {"code": 3}}) == "{'code': 3}"
    assert len(one_line("x" * 999)) < 210
    assert one_line(b"") == "nothing"
