"""Conversations as prompts: V3's format, a checkpoint's own, and what is no conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import ziphius
from tests.published import needs_published, published_folder
from tests.support import random_model, tiny_config
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    USER,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from ziphius.inference.chat import ChatTemplate, check_messages, read_chat_template
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams

HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "dive", "arguments": '{"metres": 3}'}}


@pytest.fixture(scope="module")
def published() -> Path:
    return published_folder()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a whale dives " * 9], 330)


# --- V3's format ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (HELLO, f"{BOS}{USER}Hello{ASSISTANT}"),
        (
            [{"role": "system", "content": "Be brief."}, *HELLO],
            f"{BOS}Be brief.{USER}Hello{ASSISTANT}",
        ),
        (
            [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}],
            f"{BOS}{USER}Hello{ASSISTANT}Hi{EOS}{USER}Bye{ASSISTANT}",
        ),
        (
            [*HELLO, {"role": "system", "content": "a"}, {"role": "system", "content": "b"}],
            f"{BOS}a\n\nb{USER}Hello{ASSISTANT}",
        ),
    ],
)
def test_v3_format(messages: list[dict[str, Any]], expected: str) -> None:
    assert ChatTemplate().render(messages) == expected
    assert ChatTemplate().render(messages, add_generation_prompt=False) == expected.removesuffix(
        ASSISTANT
    )


def test_reasoning_of_earlier_turns_is_left_out() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "<think>hm</think>Hi"}, *HELLO]
    assert "hm" not in ChatTemplate().render(messages)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}
    ),
    min_size=1,
    max_size=6,
)


@needs_published
@given(TURNS, st.booleans())
def test_it_is_the_published_template(
    published: Path, messages: list[dict[str, Any]], open_end: bool
) -> None:
    template = read_chat_template(published)
    assert template.source is not None
    found = ChatTemplate().render(messages, add_generation_prompt=open_end)
    assert found == template.render(messages, add_generation_prompt=open_end)


@needs_published
@given(TEXTS | st.none(), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_tools_are_the_published_templates(
    published: Path, said: str | None, calls: int, results: int, answered: bool, open_end: bool
) -> None:
    messages: list[dict[str, Any]] = [
        *HELLO,
        {"role": "assistant", "content": said, "tool_calls": [CALL] * calls},
        *({"role": "tool", "content": f"result {n}"} for n in range(results)),
    ]
    if answered:
        messages.append({"role": "assistant", "content": "Deep."})
    ours, theirs = ChatTemplate(), read_chat_template(published)
    found = ours.render(messages, add_generation_prompt=open_end)
    assert found == theirs.render(messages, add_generation_prompt=open_end)


@given(TURNS)
def test_every_text_is_in_the_prompt_in_order(messages: list[dict[str, Any]]) -> None:
    text, place = ChatTemplate().render(messages), 0
    for message in messages:
        if message["role"] != "system":
            place = text.index(message["content"], place) + len(message["content"])


@needs_published
def test_tokens_of_the_published_tokenizer(published: Path) -> None:
    """One first token, and one token for each mark."""
    llm = LLM.of(random_model(), load_tokenizer(published), kernels="torch", cache_tokens=64)
    for template in (ChatTemplate(), read_chat_template(published)):
        llm.chat_template = template
        prompt = llm.encode_chat([*HELLO, {"role": "assistant", "content": "Hi"}, *HELLO])
        ids = prompt["prompt_token_ids"]
        assert (ids[0], ids[1], ids[-1]) == (0, 128_803, 128_804)
        assert ids.count(0) == ids.count(1) == 1
        assert ids.count(128_803) == ids.count(128_804) == 2


# --- a checkpoint's own template ------------------------------------------------------------------


def write(folder: Path, template: Any = None, **config: Any) -> Path:
    whole = {"chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(whole), "utf-8")
    return folder


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path).source is None
    assert read_chat_template(write(tmp_path, "one")).render(HELLO) == "one"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    assert read_chat_template(write(tmp_path, named)).render(HELLO) == "two"
    (tmp_path / "chat_template.jinja").write_text("three", "utf-8")
    assert read_chat_template(tmp_path).render(HELLO) == "three"


def test_what_a_template_is_given(tmp_path: Path) -> None:
    source = (
        "{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}|{{ add_generation_prompt }}|"
        "{{ thinking }}|{{ tools | tojson }}|{{ strftime_now('%Y') | length }}\n"
        "{% for m in messages %}{% break %}{% endfor %}"
    )
    write(tmp_path, source, bos_token={"content": "<s>"}, eos_token="</s>", unk_token=None)
    template = read_chat_template(tmp_path)
    found = template.render(HELLO, thinking=True, tools=[{"name": "größe <b>"}])
    assert found == '<s>|</s>|Hello|True|True|[{"name": "größe <b>"}]|4\n'


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% if %}", "chat template: Expected an expression"),
        ("{{ raise_exception('no\nsystem') }}", "chat template: no system"),
        ("{{ 1 + 'a' }}", "chat template: TypeError: unsupported operand"),
        ("{{ missing.field }}", "chat template: 'missing' is undefined"),
        ("{{ messages.append(1) }}", "chat template: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "chat template: .*unsafe"),
        ("{{ range(10000000) | list }}", "chat template: "),
        ("{% include 'x' %}", "chat template: TypeError: no loader"),
    ],
)
def test_an_error_of_a_template_is_one_line(source: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        ChatTemplate(source).render(HELLO)
    assert "\n" not in str(raised.value)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    for text in ("{", "[1]"):
        (tmp_path / "tokenizer_config.json").write_text(text, "utf-8")
        with pytest.raises(BadInput, match=r"tokenizer_config\.json"):
            read_chat_template(tmp_path)


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty"),
        ("Hello", "give a list of objects"),
        ({"role": "user", "content": "x"}, "give a list of objects"),
        (["Hello"], r"messages\[0\]: give an object"),
        ([*HELLO, {"content": "x"}], r"messages\[1\]: role = None; known"),
        ([{"role": "usr", "content": "x"}], "role = 'usr'; did you mean 'user'"),
        ([{"role": "user"}], "a message of role user needs 'content'"),
        ([{"role": "assistant", "content": None}], "a message of role assistant needs 'content'"),
        ([{"role": "assistant", "tool_calls": []}], "a message of role assistant needs 'content'"),
        ([{"role": "user", "content": 3}], "content = 3: give text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only parts of type 'text'"),
        ([{"role": "assistant", "tool_calls": [{}]}], "chat template: KeyError: 'function'"),
    ],
)
def test_what_is_no_conversation(messages: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        ChatTemplate().render(messages)
    assert "\n" not in str(raised.value)


@given(st.recursive(st.none() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "type", "text", "x"]), x)))  # fmt: skip
def test_anything_is_a_conversation_or_refused(messages: Any) -> None:
    try:
        rendered = ChatTemplate().render(messages)
    except BadInput:
        return
    assert rendered.startswith(BOS)


def test_parts_of_text_are_joined_and_nothing_else_is_touched() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given_messages = [{"role": "user", "content": parts, "name": "me"}]
    assert check_messages(given_messages) == [{"role": "user", "content": "ab", "name": "me"}]
    assert given_messages[0]["content"] is parts


# --- answers --------------------------------------------------------------------------------------


def test_a_chat_is_answered(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(tiny_config(vocab_size=330))
    ziphius.save(model, tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    llm = LLM(tmp_path, kernels="torch", cache_tokens=256)
    params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    (output,) = llm.chat(HELLO, params)
    assert output.prompt == f"{BOS}{USER}Hello{ASSISTANT}"
    assert output.prompt_token_ids[0] == 0
    assert output.prompt_token_ids.count(0) == 1
    assert len(output.outputs[0].token_ids) == 3
    several = llm.chat([HELLO, [{"role": "user", "content": "Dive"}]], params)
    assert several[0].outputs == output.outputs
    assert len(several) == 2
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    own = LLM(tmp_path, kernels="torch", cache_tokens=256)
    (output,) = own.chat(HELLO, params)
    assert output.prompt == "Hello"
    assert output.prompt_token_ids[0] == 0
    with pytest.raises(BadInput, match="UTF-8"):
        own.chat([{"role": "user", "content": "\udcff"}])
