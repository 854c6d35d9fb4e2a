"""What a response gives as its answer, and nothing that it does not."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.alignment.tasks.extract import bare_answer, final_answer, last_boxed, whole_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{42}.", "42"),
        (r"First \boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \boxed{b} c}", r"a \boxed{b} c"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{open \boxed{3}", "3"),
        (r"{ \boxed{4}", "4"),
        (r"} \boxed{5} }", "5"),
        (r"\boxed{}", ""),
        (r"<answer>6</answer> \boxed{7}", "7"),
        ("<answer>6</answer> and <answer> 8 </answer> done", "8"),
        ("<answer>6</answer><answer>8", "6"),
        ("the answer is 1\n<answer>2</answer>", "2"),
        ("The answer is 3.", "3."),
        ("The answer is 3.5. It was hard.", "3.5"),
        ("Answer: b a c\nand that is all", "b a c"),
        ("The answer is 1. No, the answer is 2", "2"),
        ("**Answer:** 12", "12"),
        ("The final answer is: 12", "12"),
        ("The answer is\n\n9\n", "9"),
        ("The answer is", "The answer is"),
        ("we get 5\n\n 6 \n", "6"),
        ("unanswered is 4\n5", "5"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_the_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_without_a_box_there_is_none() -> None:
    assert last_boxed("12") is None
    assert last_boxed(r"\boxed 12") is None
    assert last_boxed(r"\boxed{12") is None


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("  12 ", "12"), ("12.", "12"), ("The answer is 12.", "12"), ("answer: 12", "12"),
        ("So, the final answer is $12$.", "12"), (r"\boxed{12}", "12"), (r"$\boxed{12}$.", "12"),
        (r"\(12\)", "12"), (r"\[ 12 \]", "12"), ("**12**", "12"), ("`b a`", "b a"), ('"ab"', "ab"),
        (r"\text{Monday}", "Monday"), ("<answer>12</answer>", "12"), ("12..", "12"),
        ("$1$ or $2$", "$1$ or $2$"), (r"\boxed{1} \boxed{2}", r"\boxed{1} \boxed{2}"),
        ("I think 12", "I think 12"), ("the answer is not 12", "not 12"),
        ("answers 12", "answers 12"),
        ("$", "$"), ("", ""), (".", ""), ("3.5", "3.5"), ("] )", "] )"), ("**", "**"),
    ],
)  # fmt: skip
def test_a_bare_answer(text: str, bare: str) -> None:
    assert bare_answer(text) == bare


@given(st.text(st.characters(exclude_characters="{}\\"), max_size=60))
def test_a_box_gives_back_what_was_put_in(text: str) -> None:
    assert final_answer(f"so \\boxed{{{text}}} it is") == text.strip()


@given(st.text(alphabet=r"\boxed{}<answer>/ is:.$*1" + "\n", max_size=80))
def test_any_text_has_a_final_answer_that_is_part_of_it(text: str) -> None:
    assert final_answer(text) in text
    assert bare_answer(text) in text


@pytest.mark.parametrize(
    "piece",
    [r"\boxed{", "<answer>", "</answer>", "answer is ", "answer ", "*", "$", "{", "}", "\\"],
)
def test_a_flood_is_read_in_no_time(piece: str) -> None:
    start = time.process_time()
    text = piece * (300_000 // len(piece))
    final_answer(text)
    bare_answer(text)
    whole_number(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12), ("1 2", 12), ("-12", -12), ("- 12", -12), ("\u221212", -12), ("+3", 3),
        ("1,234", 1234), ("1,234,567", 1234567), ("073", 73), ("0", 0), ("1 0 0", 100),
        ("12 34", None), ("1,23", None), ("0 0", None), ("1.0", None), ("1e3", None), ("", None),
        ("twelve", None), ("1_000", None), ("\u0661", None), ("12 apples", None), ("--1", None),
        ("1  2", None), ("9" * 401, None), ("9" * 400, int("9" * 400)),
    ],
)  # fmt: skip
def test_whole_numbers(text: str, number: int | None) -> None:
    assert whole_number(text) == number


@given(st.integers(-(10**12), 10**12))
def test_every_way_to_write_a_whole_number(number: int) -> None:
    assert whole_number(str(number)) == number
    assert whole_number(f"{number:,}") == number
    sign = "-" if number < 0 else ""
    assert whole_number(sign + " ".join(str(abs(number)))) == number
