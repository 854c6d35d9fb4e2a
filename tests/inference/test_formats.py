"""The built-in chat formats, character for character, and what a template can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.inference.test_chat import HELLO, TEXTS, TURNS
from tests.published import needs_published, published_folder
from ziphius.config.errors import BadInput
from ziphius.inference.chat import ChatTemplate, read_chat_template
from ziphius.inference.formats import FORMATS, opens_reasoning
from ziphius.inference.tools import Tool, check_tools, tools_text

B, E, S, U, A = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜tool▁sep｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
OUTS, OUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUT, OUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
DIVE = {"type": "function", "function": {"name": "dive", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def published() -> Path:
    return published_folder()


def call(metres: int) -> dict[str, Any]:
    arguments = f'{{"metres": {metres}}}'
    return {"id": "x", "type": "function", "function": {"name": "dive", "arguments": arguments}}


TOOLED: list[dict[str, Any]] = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [call(3), call(4)]},
    {"role": "tool", "content": "wet"},
    {"role": "tool", "content": "wetter"},
]
FENCED = [f'{CALL}function{S}dive\n```json\n{{"metres": {m}}}\n```{CALL_END}' for m in (3, 4)]
PLAIN = [f'{CALL}dive{S}{{"metres": {m}}}{CALL_END}' for m in (3, 4)]


@pytest.mark.parametrize(
    ("name", "thinking", "end"),
    [
        ("v3", None, ""),
        ("v3", True, ""),
        ("r1", None, "<think>\n"),
        ("r1", False, "<think>\n"),
        ("v3.1", None, "</think>"),
        ("v3.1", False, "</think>"),
        ("v3.1", True, "<think>"),
    ],
)
def test_how_the_next_turn_begins(name: str, thinking: bool | None, end: str) -> None:
    template = ChatTemplate(format=name)
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    expected = f"{B}Be brief.{U}Hello{A}{end}"
    assert template.render(messages, thinking=thinking) == expected
    assert template.render(messages, enable_thinking=thinking) == expected
    assert opens_reasoning(expected) == ("<think>" in end)


@pytest.mark.parametrize(
    ("name", "earlier", "end"), [("v3", "", ""), ("r1", "", "<think>\n"), ("v3.1", "</think>", "")]
)
def test_earlier_turns_have_lost_their_reasoning(name: str, earlier: str, end: str) -> None:
    said = {"role": "assistant", "content": "<think>hm</think>Hi"}
    text = ChatTemplate(format=name).render([*HELLO, said, *HELLO], thinking=True)
    end = end or ("<think>" if name == "v3.1" else "")
    assert text == f"{B}{U}Hello{A}{earlier}Hi{E}{U}Hello{A}{end}"


@pytest.mark.parametrize("name", ["v3", "r1"])
def test_calls_and_outputs_of_v3_and_r1(name: str) -> None:
    called = f"{B}{U}Hello{A}{CALLS}{FENCED[0]}\n{FENCED[1]}{CALLS_END}{E}"
    answered = f"{OUTS}{OUT}wet{OUT_END}{OUT}wetter{OUT_END}{OUTS_END}"
    template = ChatTemplate(format=name)
    assert template.render(TOOLED) == called + answered
    last = [*TOOLED, {"role": "assistant", "content": "Wet."}]
    assert template.render(last, add_generation_prompt=False) == called + answered + f"Wet.{E}"


def test_calls_and_outputs_of_v31() -> None:
    called = f"{B}{U}Hello{A}</think>{CALLS}{''.join(PLAIN)}{CALLS_END}{E}"
    answered = f"{OUT}wet{OUT_END}{OUT}wetter{OUT_END}"
    template = ChatTemplate(format="v3.1")
    assert template.render(TOOLED, thinking=True) == called + answered
    last = [*TOOLED, {"role": "assistant", "content": "Wet."}, *HELLO]
    assert template.render(last) == called + answered + f"Wet.{E}{U}Hello{A}</think>"


@given(TURNS)
def test_r1_is_v3_that_thinks(messages: list[dict[str, Any]]) -> None:
    assert ChatTemplate(format="r1").render(messages) == ChatTemplate().render(messages) + (
        "<think>\n"
    )


@needs_published
@given(TURNS, st.booleans())
def test_v31_is_the_published_template_with_its_marks(
    published: Path, messages: list[dict[str, Any]], thinking: bool
) -> None:
    """V3.1 differs from V3 in what stands behind the assistant's mark, and in nothing else."""
    plain = [m | {"content": m["content"].replace("</think>", "")} for m in messages]
    theirs = read_chat_template(published).render(plain)
    head, _, _ = theirs.rpartition(A)
    expected = head.replace(A, f"{A}</think>") + A + ("<think>" if thinking else "</think>")
    texts = "".join(m["content"] for m in plain)
    if A not in texts:
        assert ChatTemplate(format="v3.1").render(plain, thinking=thinking) == expected


def test_a_format_that_nobody_knows() -> None:
    with pytest.raises(BadInput, match=r"chat format 'v3.2'; did you mean 'v3.1'"):
        ChatTemplate(format="v3.2")
    assert read_chat_template(Path("/nowhere"), "r1").format is FORMATS["r1"]


# --- what a template can do -----------------------------------------------------------------------

TURN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ChatTemplate(), "never"),
        (ChatTemplate(format="r1"), "always"),
        (ChatTemplate(format="v3.1"), "optional"),
        (ChatTemplate(TURN), "never"),
        (ChatTemplate(TURN + "<think>\n"), "always"),
        (ChatTemplate(TURN + "{% if thinking %}<think>{% endif %}"), "optional"),
        (ChatTemplate(TURN + "{% if enable_thinking %}<think>\n\n{% endif %}"), "optional"),
        (ChatTemplate(TURN + "{% if not thinking %}<think></think>{% endif %}"), "never"),
    ],
)
def test_whether_a_template_thinks(template: ChatTemplate, expected: str) -> None:
    assert template.thinking == expected


def test_a_template_is_given_both_names_or_none() -> None:
    template = ChatTemplate("{{ thinking is defined }} {{ thinking }} {{ enable_thinking }}")
    assert template.render(HELLO, enable_thinking=True) == "True True True"
    assert template.render(HELLO, thinking=False) == "True False False"
    assert template.render(HELLO).startswith("False")
    with pytest.raises(BadInput, match="one switch"):
        template.render(HELLO, thinking=True, enable_thinking=False)
    with pytest.raises(BadInput, match="thinking: use true or false"):
        template.render(HELLO, thinking="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (TURN, "fenced"),
        ("{{ messages[1].tool_calls[0].function.name }}<｜tool▁sep｜>", "plain"),
        ("{{ messages[1].tool_calls[0].type }}<｜tool▁sep｜>", "fenced"),
        ("{{ raise_exception('no tools') }}", "fenced"),
    ],
)
def test_how_a_template_spells_calls(source: str, expected: str) -> None:
    assert ChatTemplate(source).calls == expected
    assert ChatTemplate(format="v3.1").calls == "plain"
    assert ChatTemplate(format="r1").calls == "fenced"


# --- tools ----------------------------------------------------------------------------------------


@needs_published
def test_a_template_without_tools_has_them_in_the_system_message(published: Path) -> None:
    """The published template of V3 leaves ``tools`` out: the model would not know of them."""
    for template in (read_chat_template(published), ChatTemplate(), ChatTemplate(format="r1")):
        text = template.render([{"role": "system", "content": "Be brief."}, *HELLO], tools=[DIVE])
        said = tools_text(check_tools([DIVE]), "fenced")
        assert f"Be brief.\n\n{said}{U}Hello" in text
        assert f"{B}{said}{U}" in template.render(HELLO, tools=[DIVE])
        assert template.render(HELLO, tools=[]) == template.render(HELLO)


def test_a_template_that_knows_tools_has_them_as_they_are() -> None:
    template = ChatTemplate("{% if tools is defined %}{{ tools | length }}{% endif %}" + TURN)
    assert template.render(HELLO, tools=[DIVE]) == "1user: Hello\n"
    assert template.render(HELLO, tools=[]) == "user: Hello\n"
    assert template.knows_tools
    assert not ChatTemplate("{# tools #}" + TURN).knows_tools


def test_the_words_about_tools() -> None:
    tools = [Tool("dive", "Go down.", {"type": "object"}, False), Tool("größe", "", {}, True)]
    for style, example in (
        (
            "fenced",
            f'{CALLS}{CALL}function{S}TOOL\n```json\n{{"ARGUMENT": "VALUE"}}\n```{CALL_END}',
        ),
        ("plain", f'{CALLS}{CALL}TOOL{S}{{"ARGUMENT": "VALUE"}}{CALL_END}'),
    ):
        text = tools_text(tools, style)  # type: ignore[arg-type]
        assert '### dive\nGo down.\nArguments (JSON schema): {"type": "object"}\n' in text
        assert "### größe\nArguments" in text
        assert text.endswith(example + CALLS_END)


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ({}, "give a list"),
        ("dive", "give a list"),
        (["dive"], r"tools\[0\]: give an object with type 'function'"),
        ([DIVE, {"type": "retrieval"}], r"tools\[1\]: give an object"),
        ([{"type": "x", "function": {"name": "a"}}], "give an object with type 'function'"),
        ([{"function": {"name": "a b"}}], "function.name = 'a b': use up to"),
        ([{"function": {}}], "function.name = None"),
        ([{"function": {"name": "a", "description": 3}}], "function.description = 3: give text"),
        ([{"function": {"name": "a", "parameters": []}}], "give a JSON schema, an object"),
        ([{"function": {"name": "a", "strict": "yes"}}], "function.strict = 'yes'"),
        ([DIVE, DIVE], "two are named 'dive'"),
    ],
)
def test_what_is_no_tool(tools: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        check_tools(tools)
    assert "\n" not in str(raised.value)


def test_a_tool_without_parameters_takes_none() -> None:
    (tool,) = check_tools([{"type": "function", "function": {"name": "dive"}}])
    assert tool.parameters["additionalProperties"] is False
    assert check_tools(None) == ()


@given(TEXTS, TEXTS)
def test_every_text_of_a_tooled_conversation_is_in_the_prompt(said: str, result: str) -> None:
    messages: list[dict[str, Any]] = [
        *HELLO,
        {"role": "assistant", "content": said, "tool_calls": [call(1)]},
    ]
    messages.append({"role": "tool", "content": result})
    for name in FORMATS:
        text = ChatTemplate(format=name).render(messages, tools=[DIVE])
        place = text.index(said.split("</think>")[-1])
        place = text.index('{"metres": 1}', place)
        assert result in text[place:]
