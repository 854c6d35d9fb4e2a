"""Contest problems lose their options, and those that cannot be used are counted by reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.alignment.tasks.contests import (
    COPY,
    IN_BENCHMARK,
    NEEDS_OPTIONS,
    NO_ANSWER,
    NO_QUESTION,
    NO_SUCH_OPTION,
    NOT_WHOLE,
    prepare_contests,
)
from ziphius.alignment.tasks.files import FileTask
from ziphius.alignment.tasks.options import (
    asks_about_options,
    letter_of,
    options_of,
    plain_value,
    split_options,
)
from ziphius.config.errors import BadInput

AMC = (
    r"What is the value of $1+34$? "
    r"$\textbf{(A) }\frac{100}{3}\qquad\textbf{(B) }35\qquad\textbf{(C) }40"
    r"\qquad\textbf{(D) }\frac{1}{2}\qquad\textbf{(E) }\sqrt{2}$"
)
OLD_AMC = r"How many? $\mathrm{(A) \ 12 } \qquad \mathrm{(B) \ 13 } \qquad \mathrm{(C) \ 14 }$"
ODYSSEY = (
    "Given $x$, how much is it?\n\n\\begin{align*}\n\t\\text{A)}\\ & 2022 &\n\t\\text{B)}\\ & 2023"
    "\\\\\n\t\\text{C)}\\ &  2024 &\n\t\\text{D)}\\ & 2025\\\\\n\\end{align*} \n\t\n"
    "\\end{problem}\n\\noindent"
)
LINES = "Find it.\nA. 5\nB. 6\nC. 1,200\nD. 8"
INLINE = "Find $f(A)$ (A) 5 (B) 6 (C) 7"


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        (AMC, "What is the value of $1+34$?",
         {"A": r"\frac{100}{3}", "B": "35", "C": "40", "D": r"\frac{1}{2}", "E": r"\sqrt{2}"}),
        (OLD_AMC, "How many?", {"A": "12", "B": "13", "C": "14"}),
        (ODYSSEY, "Given $x$, how much is it?",
         {"A": "2022", "B": "2023", "C": "2024", "D": "2025"}),
        (LINES, "Find it.", {"A": "5", "B": "6", "C": "1,200", "D": "8"}),
        (INLINE, "Find $f(A)$", {"A": "5", "B": "6", "C": "7"}),
        ("Cases (A) or (B) and (C) hold. How many? (A) $1$, (B) $2$, (C) $3$",
         "Cases (A) or (B) and (C) hold. How many?", {"A": "1", "B": "2", "C": "3"}),
        (r"$n$ is \underline{\hspace{2cm}}." + "\n\\end{problem}", "$n$ is ____.", {}),
        ("Points (A) and (B) are $n$ apart.", "Points (A) and (B) are $n$ apart.", {}),
        ("In $\\triangle ABC$, $P(A) = P(B)$.", "In $\\triangle ABC$, $P(A) = P(B)$.", {}),
        ("Skipping (A) 1 (C) 2 (D) 3", "Skipping (A) 1 (C) 2 (D) 3", {}),
    ],
)  # fmt: skip
def test_options_leave_the_text(text: str, question: str, options: dict[str, str]) -> None:
    assert split_options(text) == (question, options)


@given(
    st.lists(st.integers(-99, 9999), min_size=3, max_size=6),
    st.sampled_from(
        [r"\textbf{(%s) }%d\qquad", r"\mathrm{(%s)}\ %d\quad ", "(%s) %d ", "\n%s. %d", "\n%s) %d"]
    ),
)
def test_any_row_of_options_is_found(values: list[int], form: str) -> None:
    row = "".join(form % ("ABCDEF"[i], value) for i, value in enumerate(values))
    question, options = split_options(f"How much is $x$ if it is?{' ' * (form[0] != chr(10))}{row}")
    assert question == "How much is $x$ if it is?"
    assert options == {"ABCDEF"[i]: str(value) for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("C", "C"), ("(C)", "C"), ("C.", "C"), (r"\textbf{(C)}", "C"), (r"$\mathrm{(C)}$", "C"),
     ("D\\\\\n\\noindent", "D"), ("c", None), ("12", None), ("CD", None),
     ("Cat", None), ("G", None)],
)  # fmt: skip
def test_letters(answer: str, letter: str | None) -> None:
    assert letter_of(answer) == letter


def test_options_that_a_record_lists() -> None:
    assert options_of(["(A)5", "(B) 6"]) == {"A": "5", "B": "6"}
    assert options_of([5, "$6$"]) == {"A": "5", "B": "6"}
    assert options_of({"a": "5", "B": 6}) == {"A": "5", "B": "6"}
    assert options_of(None) == {}


def test_values_keep_what_is_theirs() -> None:
    for value in (r"\frac{1}{2}", "$a$ and $b$", "{1, 2}", "-3", r"3\sqrt{2}"):
        assert plain_value(value) == value
    assert plain_value("16\\\\\n\\noindent") == "16"
    assert plain_value(r"$\ 14 }$") == "14"


def test_questions_about_their_options() -> None:
    for text in (
        "Which of the following is prime?",
        "which one of these numbers",
        "Of the following",
    ):
        assert asks_about_options(text)
    assert not asks_about_options("In which year did the following sum reach 5?"[:23])
    assert not asks_about_options("How many of these are there? Which number is it?")


# Preparation


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_only_what_a_rule_can_judge_is_kept(tmp_path: Path) -> None:
    source = write(
        tmp_path / "amc.jsonl",
        {"problem": AMC, "answer": "B"},
        {"problem": AMC.replace("34", "99"), "answer": "A"},  # 100/3
        {"problem": AMC.replace("34", "98"), "answer": "F"},
        {"question": "Which of the following is prime? (A) 4 (B) 5 (C) 6", "answer": "B"},
        {"question": "What is the value of $1 + 34$?", "answer": 35},
        {"question": "", "answer": 35},
        {"question": "No answer?"},
        {"question": "A letter alone?", "answer": "C"},
        {"question": "With a list?", "options": ["(A)7", "(B)8"], "label": "B"},
        {"Problem_1": {"question": ODYSSEY, "answer": "D\\\\\n\\noindent"}},
        {"problem": "AIME's?", "answer": "073"},
        {"problem": "By its solution?", "solution": r"so \boxed{1,000}"},
        {"problem": "Not whole?", "answer": "2.5"},
        {"problem": "Whole?", "answer": 3.0},
    )
    target = tmp_path / "prepared.jsonl"
    prepared = prepare_contests([source], target)
    kept = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(record["question"], record["answer"]) for record in kept] == [
        ("What is the value of $1+34$?", "35"),
        ("With a list?", "8"),
        ("Given $x$, how much is it?", "2025"),
        ("AIME's?", "73"),
        ("By its solution?", "1000"),
        ("Whole?", "3"),
    ]
    assert {record["source"] for record in kept} == {"amc.jsonl"}
    assert prepared.read == 14
    assert prepared.kept == 6
    assert prepared.dropped == {
        NOT_WHOLE: 2, NO_SUCH_OPTION: 2, NEEDS_OPTIONS: 1, COPY: 1, NO_QUESTION: 1, NO_ANSWER: 1,
    }  # fmt: skip
    assert len(FileTask(target).problems) == 6


LONG = (
    "Janet has sixteen ducks that lay one egg per day each and she eats three of the eggs for "
    "breakfast every morning before work"
)


@pytest.mark.parametrize(
    ("question", "dropped"),
    [
        (LONG, True),
        (LONG.upper() + "!!", True),
        ("Now then: " + LONG + ". How many are left?", True),
        (" ".join(LONG.split()[:14]) + " and sells all of the others", True),
        ("Janet has sixteen ducks that lay one egg; three of them are lame.", False),
        (" ".join(reversed(LONG.split())), False),
        ("Short one", True),
        ("Another short one", False),
    ],
)
def test_what_benchmarks_ask_is_removed(tmp_path: Path, question: str, dropped: bool) -> None:
    benchmark = write(
        tmp_path / "bench.jsonl", {"question": LONG, "answer": "#### 1"}, {"prompt": "short ONE"}
    )
    source = write(
        tmp_path / "a.jsonl",
        {"problem": "Something else?", "answer": 1},
        {"problem": question, "answer": 1},
    )
    prepared = prepare_contests([source], tmp_path / "out.jsonl", [benchmark])
    assert prepared.dropped == ({IN_BENCHMARK: 1} if dropped else {})


def test_a_benchmark_s_options_hide_nothing(tmp_path: Path) -> None:
    benchmark = write(tmp_path / "bench.jsonl", {"problem": AMC})
    source = write(
        tmp_path / "a.jsonl",
        {"problem": split_options(AMC)[0], "answer": 35},
        {"problem": "Other?", "answer": 1},
    )
    prepared = prepare_contests([source], tmp_path / "out.jsonl", [benchmark])
    assert prepared.dropped == {IN_BENCHMARK: 1}


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"problem": "a", "answer": "x"}, {"problem": "b"})
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    with pytest.raises(
        BadInput, match=f"no problem is left to write: 1 {NOT_WHOLE}, 1 {NO_ANSWER}"
    ):
        prepare_contests([source], target)
    with pytest.raises(BadInput, match="the files are empty"):
        prepare_contests([], target)
    assert target.read_text() == "old"


def test_bad_files_name_file_and_line(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", {"problem": "a", "answer": 1})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"problem": "a"}\nnot json\n')
    with pytest.raises(BadInput, match=r"bad\.jsonl: line 2: is not valid JSON"):
        prepare_contests([good, bad], tmp_path / "out")
    with pytest.raises(BadInput, match=r"bad\.jsonl: line 2: is not valid JSON"):
        prepare_contests([good], tmp_path / "out", [bad])
    odd = write(tmp_path / "odd.jsonl", {"text": "a"})
    with pytest.raises(BadInput, match=r"odd\.jsonl: line 1: has no 'problem', 'question' or"):
        prepare_contests([good], tmp_path / "out", [odd])
    with pytest.raises(BadInput, match="none: cannot be read"):
        prepare_contests([tmp_path / "none"], tmp_path / "out")
