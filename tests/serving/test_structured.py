"""Structured answers: what a grammar lets through is what was asked, also behind reasoning."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.published import needs_published, published_folder
from tests.serving.answers import Step, answer, encode, read
from tests.support import random_model
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import EOS_ID, load_tokenizer, train_tokenizer
from ziphius.inference.chat import ChatTemplate
from ziphius.inference.formats import opens_reasoning
from ziphius.inference.grammar import Grammars
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams
from ziphius.inference.tools import CallStyle, Tool, check_tools
from ziphius.inference.vocabulary import Vocabulary
from ziphius.serving.parse import Markers
from ziphius.serving.structured import Choice, check_choice, structure

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
VOCABULARY = 360
TEXT = 'function dive {"metres": 3, "a": [true]}\n```json\n\n Größe 🐋 hm Wal surface '
STYLES: list[CallStyle] = ["fenced", "plain"]
WHERE = {
    "type": "object",
    "properties": {
        "place": {"enum": ["Rome", "::=", 'a"\n'], "description": "::= {}"},
        "metres": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["place", "metres"],
    "additionalProperties": False,
}
DIVE = {"type": "function", "function": {"name": "dive", "parameters": WHERE}}
SURFACE = {"type": "function", "function": {"name": "surface"}}
TOOLS = check_tools([DIVE, SURFACE])
STRICT = [TOOLS[0]._replace(strict=True), TOOLS[1]]
DOWN = '{"place": "Rome", "metres": 3}'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 3], VOCABULARY)


class Judge(Grammars):
    """Grammars that remember whose tokens they speak of."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__(Vocabulary(tokenizer), [EOS_ID], vocab_size)
        self.speaker = tokenizer


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Judge:
    return Judge(tokenizer, VOCABULARY)


@pytest.fixture(scope="module")
def markers(tokenizer: Tokenizer) -> Markers:
    return Markers.of(tokenizer)


def called(style: CallStyle, *calls: tuple[str, str]) -> str:
    if style == "plain":
        return CALLS + "".join(f"{CALL}{n}{SEP}{a}{CALL_END}" for n, a in calls) + CALLS_END
    spelled = [f"{CALL}function{SEP}{n}\n```json\n{a}\n```{CALL_END}" for n, a in calls]
    return CALLS + "\n".join(spelled) + CALLS_END


def accepts(grammars: Judge, fields: dict[str, Any], text: str) -> bool:
    """Say whether the whole text, and then the end, is an answer."""
    constraint = SamplingParams(**fields).constraint
    assert constraint is not None
    matcher = grammars.matcher(constraint)
    for token in [*encode(grammars.speaker, text), EOS_ID]:
        if not matcher.mask()[token]:
            return False
        matcher.advance(token)
    return matcher.must_end


# --- formats of text ------------------------------------------------------------------------------

JSON = {"type": "json_schema", "json_schema": {"name": "where", "schema": WHERE, "strict": True}}
FORMATS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, '{"a": [true]}', "[true]"),
    ({"response_format": JSON}, DOWN, '{"place": "Rome"}'),
    ({"response_format": {"type": "json_schema", "schema": WHERE}}, DOWN, "{}"),
    ({"guided": {"json": WHERE}}, DOWN, "{}"),
    ({"guided": {"guided_json": json.dumps(WHERE)}}, DOWN, "{}"),
    ({"guided": {"json_object": True}}, "{}", "1"),
    ({"guided": {"regex": r"[a-z/]+\d"}}, "hm/3", "hm"),
    ({"guided": {"choice": ["Wal", 'a::="b']}}, 'a::="b', "Walhm"),
    ({"guided": {"grammar": 'root ::= "a}" | "b{"'}}, "b{", "a"),
    ({"guided": {"guided_grammar": 'start: "a}" X\nX: /[{}]/'}}, "a}{", "a}"),
]


@pytest.mark.parametrize(("asked", "good", "bad"), FORMATS)
def test_a_format_binds_the_answer(
    grammars: Judge, markers: Markers, asked: dict[str, Any], good: str, bad: str
) -> None:
    fields = structure(markers, "fenced", in_reasoning=False, **asked)
    assert accepts(grammars, fields, good)
    assert not accepts(grammars, fields, bad)
    assert not accepts(grammars, fields, f"hm</think>{good}")


@pytest.mark.parametrize(("asked", "good", "bad"), FORMATS)
def test_reasoning_together_with_guided_decoding(
    grammars: Judge, markers: Markers, asked: dict[str, Any], good: str, bad: str
) -> None:
    """The format begins behind the reasoning, which is free and must end."""
    fields = structure(markers, "fenced", in_reasoning=True, **asked)
    for thought in ("", "hm {\n\n", "Größe 🐋 <", bad, good):
        for blanks in ("", "\n", "\n\n"):
            assert accepts(grammars, fields, f"{thought}</think>{blanks}{good}")
        assert not accepts(grammars, fields, f"{thought}</think>\n\n{bad}")
        assert not accepts(grammars, fields, thought)
    assert not accepts(grammars, fields, f"<think>hm</think>{good}")
    assert not accepts(grammars, fields, good)


def test_free_text_is_left_free(markers: Markers) -> None:
    for response_format in (None, {"type": "text"}):
        for guided in (None, {}, {"json": None, "json_object": False}):
            fields = structure(
                markers, "plain", in_reasoning=True, response_format=response_format, guided=guided
            )
            assert fields == {}


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_reasoning", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_a_call_that_is_required(
    grammars: Judge, markers: Markers, style: CallStyle, in_reasoning: bool
) -> None:
    def ok(text: str, **how: Any) -> bool:
        fields = structure(
            markers, style, in_reasoning=in_reasoning, tools=TOOLS,
            **{"tool_choice": "required", **how},
        )  # fmt: skip
        return accepts(grammars, fields, ("hm</think>\n\n" if in_reasoning else "") + text)

    one, two = called(style, ("dive", DOWN)), called(style, ("surface", "{}"), ("dive", DOWN))
    assert ok(one)
    assert ok(two)
    assert ok(one, parallel_tool_calls=False)
    assert not ok(two, parallel_tool_calls=False)
    assert not ok("Wal")
    assert not ok(f"Wal{one}")
    assert not ok(called(style))
    assert not ok(called(style, ("dive", "{}")))
    assert not ok(called(style, ("rise", "{}")))
    assert not ok(called(style, ("surface", '{"a": 1}')))
    other: CallStyle = "plain" if style == "fenced" else "fenced"
    assert not ok(called(other, ("dive", DOWN)))
    named = {"type": "function", "function": {"name": "dive"}}
    assert ok(one, tool_choice=named)
    assert ok(one, tool_choice={"type": "function", "name": "dive"})
    assert not ok(two, tool_choice=named)
    # The format is the content's, and there is none.
    assert ok(one, response_format={"type": "json_object"})


@pytest.mark.parametrize("style", STYLES)
def test_auto_is_free_unless_a_tool_is_strict(
    grammars: Judge, markers: Markers, style: CallStyle
) -> None:
    assert structure(markers, style, in_reasoning=False, tools=TOOLS) == {}
    fields = structure(markers, style, in_reasoning=False, tools=STRICT, tool_choice="auto")
    good, bad = called(style, ("dive", DOWN)), called(style, ("dive", "{}"))
    assert accepts(grammars, fields, "")
    for text in ("", "Wal\n", "<think>hm</think>", "<think>hm</think>\n\nWal "):
        assert accepts(grammars, fields, text)
        assert accepts(grammars, fields, text + good)
        assert not accepts(grammars, fields, text + bad)
        assert not accepts(grammars, fields, text + good + "Wal")
    fields = structure(markers, style, in_reasoning=True, tools=STRICT)
    assert accepts(grammars, fields, f"hm</think>Wal{good}")
    assert not accepts(grammars, fields, f"hm</think>Wal{bad}")
    assert not accepts(grammars, fields, "hm")


@pytest.mark.parametrize("style", STYLES)
def test_one_call_at_most(grammars: Judge, markers: Markers, style: CallStyle) -> None:
    fields = structure(markers, style, in_reasoning=False, tools=TOOLS, parallel_tool_calls=False)
    assert accepts(grammars, fields, "Wal")
    assert accepts(grammars, fields, called(style, ("surface", "{}")))
    assert not accepts(grammars, fields, called(style, ("surface", "{}"), ("surface", "{}")))


@pytest.mark.parametrize("in_reasoning", [False, True])
def test_a_format_binds_the_answer_that_calls_nothing(
    grammars: Judge, markers: Markers, in_reasoning: bool
) -> None:
    how: dict[str, Any] = {"tools": TOOLS, "response_format": {"type": "json_object"}}
    fields = structure(markers, "plain", in_reasoning=in_reasoning, **how)
    head = "hm</think>" if in_reasoning else ""
    assert accepts(grammars, fields, head + "{}")
    assert accepts(grammars, fields, head + called("plain", ("dive", DOWN)))
    assert not accepts(grammars, fields, head + "Wal")
    assert not accepts(grammars, fields, head + "{}" + called("plain", ("dive", DOWN)))


def test_no_call_with_tool_choice_none(grammars: Judge, markers: Markers) -> None:
    """The marks that begin calls can't be chosen, so nothing of them can leak."""
    fields = structure(markers, "plain", in_reasoning=False, tools=TOOLS, tool_choice="none")
    assert fields == {"banned_token_ids": (markers.calls_begin, markers.call_begin)}
    assert structure(markers, "plain", in_reasoning=False, tool_choice="none") == {}
    how: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": "none",
        "response_format": {"type": "json_object"},
    }
    fields = structure(markers, "plain", in_reasoning=False, **how)
    assert accepts(grammars, fields, "{}")
    assert not accepts(grammars, fields, called("plain", ("dive", DOWN)))


def test_a_tokenizer_without_marks() -> None:
    how: dict[str, Any] = {"in_reasoning": False, "tools": TOOLS}
    none, schema = Markers(), {"type": "json_object"}
    assert structure(none, "plain", **how) == {}
    assert structure(none, "plain", tool_choice="none", **how) == {}
    assert "json_schema" in structure(none, "plain", response_format=schema, **how)
    with pytest.raises(BadInput, match="no token <｜tool▁calls▁begin｜>"):
        structure(none, "plain", tool_choice="required", **how)
    with pytest.raises(BadInput, match="no token </think>: reasoning could not end"):
        structure(none, "plain", in_reasoning=True, response_format=schema)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"response_format": "json"}, "response_format: type = None; known: json_object"),
        ({"response_format": {"type": "json"}}, "type = 'json'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema needs 'schema'"),
        ({"response_format": {"type": "json_schema", "schema": [1]}}, "a JSON schema is an object"),
        ({"guided": {"jsn": {}}}, "guided option 'jsn'; did you mean 'json'"),
        ({"guided": {"json": "{"}}, "guided json: no JSON"),
        ({"guided": {"regex": "a\\"}}, "guided regex: does not compile"),
        ({"guided": {"regex": 3}}, "guided regex = 3: use text"),
        ({"guided": {"choice": []}}, "give a list of texts"),
        ({"guided": {"choice": ["a", 1]}}, "guided choice: 1: use texts"),
        ({"guided": {"choice": "ab"}}, "give a list of texts"),
        ({"guided": {"grammar": "root ::= ("}}, "guided grammar: does not compile"),
        ({"guided": {"json": {}, "regex": "a"}}, "json and regex: give one format"),
        (
            {"guided": {"json": {}}, "response_format": {"type": "json_object"}},
            "json and response_format: give one format",
        ),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "always", "tools": TOOLS}, "tool_choice = 'always': use none, auto"),
        ({"tool_choice": {"type": "x"}, "tools": TOOLS}, "tool_choice: give {'type'"),
        ({"tool_choice": {"function": 1}, "tools": TOOLS}, "tool_choice: give {'type'"),
        (
            {"tool_choice": {"function": {"name": "dve"}}, "tools": TOOLS},
            "'dve' is not among tools; did you mean 'dive'",
        ),
        (
            {"tool_choice": "required", "tools": TOOLS, "guided": {"regex": "a"}},
            "a call and a guided option",
        ),
    ],
)
def test_what_cannot_be_asked(markers: Markers, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        structure(markers, "fenced", in_reasoning=False, **asked)
    assert "\n" not in str(raised.value)


def test_a_schema_that_is_impossible_is_refused(grammars: Judge, markers: Markers) -> None:
    tools = [Tool("dive", "", {"type": "nosuch"}, True)]
    fields = structure(markers, "plain", in_reasoning=True, tools=tools)
    with pytest.raises(BadInput, match=r"does not compile.*nosuch"):
        grammars.matcher(SamplingParams(**fields).constraint)  # type: ignore[arg-type]


def test_who_chooses() -> None:
    assert check_choice(None, ()) == Choice("none")
    assert check_choice("auto", ()) == Choice("none")
    assert check_choice(None, TOOLS) == Choice("auto")
    assert check_choice("required", TOOLS) == Choice("required")
    named = {"type": "function", "function": {"name": "dive"}}
    assert check_choice(named, TOOLS) == Choice("required", "dive")


# --- answers --------------------------------------------------------------------------------------


def walk(grammars: Judge, fields: dict[str, Any], chance: random.Random) -> list[int]:
    """Draw tokens under the mask; marks and the end where they may come, mostly."""
    matcher = grammars.matcher(SamplingParams(**fields).constraint)  # type: ignore[arg-type]
    tokens: list[int] = []
    while not matcher.must_end:
        allowed = np.flatnonzero(matcher.mask()).tolist()
        marks = [token for token in allowed if token < 30]
        few = marks if marks and chance.random() < 0.5 else allowed
        tokens.append(chance.choice(few))
        matcher.advance(tokens[-1])
        assert len(tokens) < 1000
    return tokens


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(STYLES), st.booleans(), st.booleans())
def test_whatever_is_drawn_is_parsed_to_calls_that_follow_their_schemas(
    grammars: Judge,
    markers: Markers,
    tokenizer: Tokenizer,
    seed: int,
    style: CallStyle,
    in_reasoning: bool,
    strict: bool,
) -> None:
    fields = structure(
        markers, style, in_reasoning=in_reasoning, tools=STRICT if strict else TOOLS,
        tool_choice="auto" if strict else "required",
    )  # fmt: skip
    tokens = walk(grammars, fields, random.Random(seed))
    found = read(markers, answer(Vocabulary(tokenizer), tokens), in_reasoning=in_reasoning)
    check(found.parsed.calls, TOOLS, at_least=0 if strict else 1)
    assert strict or not found.parsed.content


def check(calls: Sequence[Any], tools: Sequence[Tool], at_least: int) -> None:
    assert len(calls) >= at_least
    schemas = {tool.name: tool.parameters for tool in tools}
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])


@pytest.mark.parametrize("form", ["v3", "r1", "v3.1"])
def test_a_random_model_calls_tools(tokenizer: Tokenizer, markers: Markers, form: str) -> None:
    """A model that has learned nothing, asked as a server asks: each answer is a call."""
    model = random_model(vocab_size=VOCABULARY, max_position_embeddings=768)
    llm = LLM.of(model, tokenizer, kernels="torch", cache_tokens=2048)
    template = ChatTemplate(format=form)
    llm.chat_template = template
    asked = {"tools": [DIVE, SURFACE], "thinking": True}
    prompt = llm.encode_chat([{"role": "user", "content": "Hello"}], **asked)
    in_reasoning = opens_reasoning(prompt["prompt"])
    assert in_reasoning == (form != "v3")
    fields = structure(
        markers, template.calls, in_reasoning=in_reasoning, tools=TOOLS, tool_choice="required"
    )
    # Else it thinks for long.
    bias = {token: 8.0 for token in (markers.end_think, markers.calls_end) if token is not None}
    params = SamplingParams(max_tokens=300, seed=1, logit_bias=bias, **fields)
    (output,) = llm.generate([prompt], params)
    (one,) = output.outputs
    assert one.finish_reason == "stop"
    step = Step(one.text, list(one.token_ids), list(one.offsets))
    found = read(markers, [step], in_reasoning=in_reasoning)
    check(found.parsed.calls, TOOLS, at_least=1)
    assert not found.parsed.content
    assert (found.reasoning_tokens > 0) == in_reasoning


@needs_published
def test_with_the_published_tokenizer() -> None:
    """Its marks have other ids, and its tokens go over more than one part of a call."""
    tokenizer = load_tokenizer(published_folder())
    grammars = Judge(tokenizer, 129_280)
    markers = Markers.of(tokenizer)
    for style in STYLES:
        how: dict[str, Any] = {"in_reasoning": True, "tools": TOOLS, "tool_choice": "required"}
        fields = structure(markers, style, **how)
        assert f"<[{128_799}]>" in fields["grammar"]
        two = called(style, ("dive", DOWN), ("surface", "{}"))
        assert accepts(grammars, fields, f"hm, so\n</think>\n\n{two}")
        assert not accepts(grammars, fields, f"hm</think>{called(style, ('dive', '{}'))}")
