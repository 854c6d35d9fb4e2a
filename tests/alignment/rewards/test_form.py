"""Forms of responses: what has one, and what almost has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.alignment.rewards.support import boxed, respond
from ziphius.alignment.rewards.form import marked_answer, think_form, zero_form

THOUGHT = "<think>so</think>"


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (f"{THOUGHT}7", 1.0),
        (f"\n{THOUGHT}\n\n7\n", 1.0),
        ("7", 0.0),
        (THOUGHT, 0.0),
        (f"{THOUGHT} \n", 0.0),
        ("<think> \n</think>7", 0.0),
        ("<think>so", 0.0),
        ("so</think>7", 0.0),
        ("</think>so<think>7", 0.0),
        (f"before {THOUGHT}7", 0.0),
        (f"{THOUGHT}{THOUGHT}7", 0.0),
        ("<think><think>so</think>7", 0.0),
        ("<think>so</think>7</think>", 0.0),
    ],
)
def test_think_tags_are_once_and_in_order(text: str, worth: float) -> None:
    assert think_form(respond(text)) == worth


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (f"{THOUGHT}<answer>7</answer>", 1.0),
        (f" {THOUGHT}\n<answer> 7 </answer>\n", 1.0),
        (f"{THOUGHT} 7", 0.0),
        (f"{THOUGHT}<answer>7</answer> more", 0.0),
        (f"{THOUGHT} more <answer>7</answer>", 0.0),
        (f"{THOUGHT}<answer> </answer>", 0.0),
        ("<think> </think><answer>7</answer>", 0.0),
        (f"<answer>7</answer>{THOUGHT}", 0.0),
        ("<think>so<answer>7</answer></think>", 0.0),
        (f"{THOUGHT}<answer>7</answer><answer>8</answer>", 0.0),
        (f"{THOUGHT}<answer>7", 0.0),
    ],
)
def test_the_form_of_r1_zero(text: str, worth: float) -> None:
    assert zero_form(respond(text)) == worth


def test_what_is_cut_has_no_form() -> None:
    for form in (think_form, zero_form, marked_answer(boxed)):
        text = rf"{THOUGHT}<answer>\boxed{{7}}</answer>"
        assert form(respond(text)) == 1.0
        assert form(respond(text, finished=False)) == 0.0


def test_the_answer_is_marked_after_the_reasoning() -> None:
    form = marked_answer(boxed)
    assert form(respond(r"<think>x</think>it is \boxed{7}")) == 1.0
    assert form(respond(r"<think>\boxed{7}</think>it is 7")) == 0.0
    assert form(respond(r"it is \boxed{ }")) == 0.0


TAGS = ("<think>", "</think>", "<answer>", "</answer>", "a", " ")


@given(st.lists(st.sampled_from(TAGS), max_size=8).map("".join))
def test_only_texts_with_each_tag_once_have_a_form(text: str) -> None:
    if think_form(respond(text)):
        assert text.count("<think>") == text.count("</think>") == 1
    if zero_form(respond(text)):
        # R1-Zero's form is also one that thinks.
        assert think_form(respond(text)) == 1.0
        assert [text.count(tag) for tag in TAGS[:4]] == [1, 1, 1, 1]
