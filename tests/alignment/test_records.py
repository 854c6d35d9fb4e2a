"""Conversations as samples: what is learned, what follows what, and lines that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ziphius.alignment.records import read_records, samples_of
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import EOS_ID, train_tokenizer
from ziphius.inference.chat import ChatTemplate


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["how are you", "fine, thanks", "and then"], 300)


def samples(
    tmp_path: Path,
    tokenizer: Tokenizer,
    *conversations: list[dict[str, Any]],
    format: str = "v3.1",
    longest: int = 999,
    **more: Any,
) -> tuple[list[tuple[str, list[str]]], dict[str, int]]:
    """Return of every sample its whole text and the stretches that are learned."""
    file = tmp_path / "chats.jsonl"
    lines = [json.dumps({"messages": messages, **more}) for messages in conversations]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    records, _ = read_records([file])
    found, dropped = samples_of(records, ChatTemplate(format=format), tokenizer, longest)
    return [(spelled(tokenizer, s), stretches(tokenizer, s)) for s in found], dropped.describe()


def spelled(tokenizer: Tokenizer, sample: Any) -> str:
    return tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)


def stretches(tokenizer: Tokenizer, sample: Any) -> list[str]:
    runs: list[list[int]] = []
    before = False
    for token, learned in zip(sample.tokens.tolist(), sample.learned.tolist(), strict=True):
        if learned:
            runs = [*runs, []] if not before else runs
            runs[-1].append(token)
        before = learned
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


END = "<｜end▁of▁sentence｜>"
BEGIN = "<｜begin▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


def test_all_turns_of_a_chat_without_reasoning_are_one_sample(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    chat = [user("how"), said("fine"), user("and"), said("then")]
    found, _ = samples(tmp_path, tokenizer, chat, format="v3")
    text = f"{BEGIN}{USER}how{ASSISTANT}fine{END}{USER}and{ASSISTANT}then{END}"
    assert found == [(text, [f"fine{END}", f"then{END}"])]


def test_a_turn_with_reasoning_is_a_sample_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Later prompts leave its reasoning out, so what follows is another text."""
    chat = [user("how"), said("fine", reasoning_content="well"), user("and"), said("then")]
    found, _ = samples(tmp_path, tokenizer, chat)
    first = f"{BEGIN}{USER}how{ASSISTANT}<think>well</think>fine{END}"
    second = f"{BEGIN}{USER}how{ASSISTANT}</think>fine{END}{USER}and{ASSISTANT}</think>then{END}"
    assert found == [(first, [f"well</think>fine{END}"]), (second, [f"then{END}"])]


def test_reasoning_may_stand_in_the_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = samples(tmp_path, tokenizer, [user("how"), said("<think>well</think>fine")])
    apart = samples(tmp_path, tokenizer, [user("how"), said("fine", reasoning_content="well")])
    assert whole == apart


def test_r1_writes_its_reasoning_on_lines_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = [user("how"), said("fine", reasoning_content="well")]
    found, _ = samples(tmp_path, tokenizer, chat, format="r1")
    assert found[0][1] == [f"well\n</think>\n\nfine{END}"]


def test_v3_has_no_tags_unless_there_is_reasoning(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = [user("how"), said("fine", reasoning_content="well")]
    found, _ = samples(tmp_path, tokenizer, chat, format="v3")
    assert found[0][1] == [f"<think>well</think>fine{END}"]


def test_calls_of_tools_are_learned_and_their_results_are_not(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    chat = [
        user("how"),
        said("", tool_calls=[call]),
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        said("then"),
    ]
    tools = [{"type": "function", "function": {"name": "now", "description": "the time"}}]
    found, dropped = samples(tmp_path, tokenizer, chat, format="v3", tools=tools)
    text, learned = found[0]
    assert len(found) == 1
    assert "the time" in text
    assert learned[0].endswith(END)
    assert "now" in learned[0]
    assert learned[1] == f"then{END}"
    assert not any("noon" in stretch for stretch in learned)
    assert dropped == {"empty": 0, "too_long": 0}


def test_a_turn_of_weight_0_is_read_and_not_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = [user("how"), said("fine", weight=0), user("and"), said("then")]
    found, _ = samples(tmp_path, tokenizer, chat, format="v3")
    assert [learned for _, learned in found] == [[f"then{END}"]]
    only = [user("how"), said("fine", weight=0)]
    assert samples(tmp_path, tokenizer, only, format="v3")[0] == []


def test_empty_turns_and_long_samples_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    empty, long = [user("how"), said("")], [user("how"), said("then " * 50)]
    found, dropped = samples(
        tmp_path, tokenizer, empty, long, [user("how"), said("then")], longest=20
    )
    assert len(found) == 1
    assert dropped == {"empty": 1, "too_long": 1}


def test_a_prompt_and_its_response_are_a_conversation(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "how", "response": "fine"}), "utf-8")
    records, _ = read_records([file])
    found, _ = samples_of(records, ChatTemplate(format="v3"), tokenizer, 99)
    assert stretches(tokenizer, found[0]) == [f"fine{END}"]
    assert found[0].tokens[-1] == EOS_ID


def test_what_else_a_line_holds_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(
        json.dumps({"messages": [user("a"), said("b")], "teacher": {"seed": 3}}), "utf-8"
    )
    assert read_records([file])[0][0].about == {"teacher": {"seed": 3}}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON"),
        ("[]", "an object"),
        ("{}", "messages"),
        ('{"messages": []}', "empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "robot"),
        ('{"messages": [{"role": "user"}]}', "content"),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "weight"),
        ('{"messages": [{"role": "assistant", "content": "a", "reasoning_content": 1}]}', "text"),
        ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "tool call"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": 3}', "tools"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": [user("a"), said("b")]})
    file.write_text(f"{good}\n\n{line}\n", "utf-8")
    with pytest.raises(BadInput, match=r"chats\.jsonl: line 3.*") as caught:
        read_records([file])
    assert says in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.jsonl: cannot be read"):
        read_records([tmp_path / "none.jsonl"])
