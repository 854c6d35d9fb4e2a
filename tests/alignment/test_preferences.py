"""Pairs from JSON lines: the forms they come in, one prompt for both, and lines that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ziphius.alignment.preferences import pairs_of, read_preferences
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import train_tokenizer
from ziphius.inference.chat import ChatTemplate


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["how are you", "fine, thanks", "and then"], 300)


def read(tmp_path: Path, *lines: object):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    return read_preferences([file])[0]


def pairs(tmp_path: Path, tokenizer: Tokenizer, *lines: object, longest: int = 999):
    """Return of every pair the text of each side and what is learned of it."""
    found, dropped = pairs_of(
        read(tmp_path, *lines), ChatTemplate(format="v3.1"), tokenizer, longest
    )

    def told(sample) -> tuple[str, str]:
        whole = tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)
        own = tokenizer.decode(sample.tokens[sample.learned].tolist(), skip_special_tokens=False)
        return whole, own

    return [tuple(map(told, pair)) for pair in found], dropped.describe()


PLAIN = {"prompt": "how", "chosen": "fine", "rejected": "and"}
FORMS = (
    PLAIN,
    {"prompt": [user("how")], "chosen": [said("fine")], "rejected": [said("and")]},
    {"messages": [user("how")], "chosen": said("fine"), "rejected": said("and")},
    {"chosen": [user("how"), said("fine")], "rejected": [user("how"), said("and")]},
    # The prompt is there twice, as a text and as the first message.
    {**PLAIN, "chosen": [user("how"), said("fine")], "rejected": [user("how"), said("and")]},
)


@pytest.mark.parametrize("line", FORMS)
def test_all_forms_are_one_pair(tmp_path: Path, tokenizer: Tokenizer, line: object) -> None:
    ((chosen, rejected),), dropped = pairs(tmp_path, tokenizer, line)
    expected, _ = pairs(tmp_path, tokenizer, PLAIN)
    assert (chosen, rejected) == expected[0]
    assert chosen[1].startswith("fine")
    assert rejected[1].startswith("and")
    assert chosen[0].removesuffix(chosen[1]) == rejected[0].removesuffix(rejected[1])
    assert not any(dropped.values())


def test_what_was_said_before_is_not_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    before = [user("how"), said("fine"), user("and then")]
    line = {"prompt": before, "chosen": "thanks", "rejected": "you"}
    (((whole, learned), _),), _ = pairs(tmp_path, tokenizer, line)
    assert "fine" in whole
    assert learned.startswith("thanks")


def test_both_sides_follow_one_prompt_where_one_thinks(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    line = {
        "prompt": "how",
        "chosen": said("fine", reasoning_content="and then"),
        "rejected": said("and"),
    }
    ((chosen, rejected),), _ = pairs(tmp_path, tokenizer, line)
    assert chosen[0].removesuffix(chosen[1]) == rejected[0].removesuffix(rejected[1])
    assert chosen[1].startswith("and then</think>fine")
    assert rejected[1].startswith("</think>and")


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = (
        PLAIN,
        {**PLAIN, "chosen": ""},
        {**PLAIN, "rejected": "fine"},
        {**PLAIN, "rejected": "and " * 100},
    )
    found, dropped = pairs(tmp_path, tokenizer, *lines, longest=60)
    assert len(found) == 1
    assert dropped == {"empty": 1, "too_long": 1, "same": 1}


def test_the_rest_of_a_line_is_kept(tmp_path: Path) -> None:
    (pair,) = read(tmp_path, {**PLAIN, "subset": "s", "n": 3})
    assert pair.about == {"subset": "s", "n": 3}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ([], "no JSON object"),
        ({"prompt": "how", "chosen": "fine"}, "rejected: give a text"),
        ({**PLAIN, "chosen": 3}, "chosen: give a text"),
        ({**PLAIN, "chosen": [user("how")]}, "must be the assistant's"),
        ({**PLAIN, "chosen": ["fine"]}, "messages are objects"),
        ({"chosen": "fine", "rejected": "and"}, "give 'prompt'"),
        ({**PLAIN, "prompt": 3}, "prompt: give a text"),
        (
            {"chosen": [user("how"), said("a")], "rejected": [user("you"), said("b")]},
            "differ before their last message",
        ),
        ({**PLAIN, "chosen": said("a", reasoning_content=3)}, "reasoning_content"),
        ({**PLAIN, "tools": 3}, "tools"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: object, says: str) -> None:
    with pytest.raises(BadInput, match=r"pairs\.jsonl: line 2.*") as caught:
        read(tmp_path, PLAIN, line)
    assert says in str(caught.value)
