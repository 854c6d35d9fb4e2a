"""The built-in formats as Jinja: the same text, here and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ziphius.data.tokenizer import save_tokenizer, train_tokenizer
from ziphius.inference.chat import TEMPLATE_FILE, ChatTemplate, read_chat_template
from ziphius.inference.formats import FORMATS
from ziphius.inference.template import chat_template_of

CALL = {"id": "1", "type": "function", "function": {"name": "sum", "arguments": '{"a": "é\\n"}'}}
OBJECT = {"id": "2", "type": "function", "function": {"name": "max", "arguments": {"b": [1, "ß"]}}}
USER, SYSTEM = ({"role": role, "content": f"the {role}'s\n'text'"} for role in ("user", "system"))
TOOL = {"role": "tool", "content": "7"}


def said(text: str | None, *calls: Any) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    return message | ({"tool_calls": list(calls)} if calls else {})


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "systems": [SYSTEM, USER, {"role": "system", "content": "more"}, said("yes"), USER],
    "reasoning": [USER, said("<think>so</think>a</think>b"), USER],
    "calls": [USER, said(None, CALL, OBJECT), TOOL, TOOL, said("done"), USER],
    "open outputs": [USER, said("I look", CALL), TOOL],
    "tools then user": [USER, said("", CALL), TOOL, USER],
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("thinking", [None, True, False])
def test_text_is_the_built_in_formats(
    name: str, messages: list[dict[str, Any]], thinking: bool | None
) -> None:
    ours, theirs = ChatTemplate(chat_template_of(name)), ChatTemplate(format=name)
    for more in (True, False):
        how: dict[str, Any] = {"add_generation_prompt": more, "thinking": thinking}
        assert ours.render(messages, **how) == theirs.render(messages, **how)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_known_of_a_format_is_known_of_its_template(name: str) -> None:
    ours, theirs = ChatTemplate(chat_template_of(name)), ChatTemplate(format=name)
    assert (ours.thinking, ours.calls) == (theirs.thinking, theirs.calls)
    assert not ours.knows_tools  # so that they are described in our words, as with the format


@pytest.mark.parametrize("name", FORMATS)
def test_transformers_renders_the_same(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(train_tokenizer(["some words of some text"], 300), tmp_path)
    (tmp_path / TEMPLATE_FILE).write_text(chat_template_of(name), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS.values():
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == read_chat_template(tmp_path).render(messages)
