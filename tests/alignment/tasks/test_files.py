"""Problems from files: what each shape gives, and what a bad line is told."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.alignment.tasks.files import FileTask, number_of
from ziphius.alignment.tasks.problem import problem_at
from ziphius.config.errors import BadInput

EVALS = "shared/data/evals"


def written(folder: Path, *records: Any) -> Path:
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def evals(name: str) -> Path:
    for folder in Path(__file__).parents:
        if (path := folder / EVALS / name).is_file():
            return path
    pytest.skip(f"needs the published file: no folder above has {EVALS}/{name}")


GSM = {
    "question": "Two boxes of 600?",
    "answer": "Two times 600 = <<2*600=1200>>1200.\n#### 1,200",
}
HUMAN_EVAL = {
    "task_id": "HumanEval/0", "prompt": "def one():\n    ", "canonical_solution": "return 1\n",
    "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one",
}  # fmt: skip
MBPP = {
    "text": "Write two.", "code": "def two(): return 2", "test_setup_code": "import math",
    "test_list": ["assert two() == 2", "assert two() > 1"], "task_id": 1,
}  # fmt: skip
PROGRAM = {"prompt": "Write three.", "tests": ["assert three() == 3"], "entry_point": "three"}


def test_gsm8k_s_shape(tmp_path: Path) -> None:
    task = FileTask(written(tmp_path, GSM, {"question": "2?", "answer": 2}))
    first, second = task.problems
    assert (first.question, first.answer) == ("Two boxes of 600?", "1200")
    assert first.steps == "Two times 600 = 1200.\n1200"
    assert (second.answer, second.steps) == ("2", "")
    assert task.judged_by == "answer"
    assert first.task == task.name == f"file:{tmp_path / 'some.jsonl'}"


@pytest.mark.parametrize(
    ("answer", "right"),
    [("1200", True), ("1,200", True), ("$1,200.00", True), ("The answer is 1200.", True),
     (r"\boxed{1{,}200}", False), (r"\boxed{1200}", True), (r"\$1200", True), ("1200.5", False),
     ("-1200", False), ("12000", False), ("1200 or 1", False), ("12,00", False), ("", False)],
)  # fmt: skip
def test_numbers_are_compared_by_value(tmp_path: Path, answer: str, right: bool) -> None:
    task = FileTask(written(tmp_path, GSM))
    assert task.right(answer, task.problems[0]) == right


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", Fraction(5)), ("-0.5", Fraction(-1, 2)), ("-$3", Fraction(-3)), ("$-3", Fraction(-3)),
     ("20%", Fraction(20)), ("1,000.25", Fraction(4001, 4)), ("--3", None), ("-$-3", None),
     ("1,00", None), (".5", None), ("5.", None), ("1/2", None), ("five", None), ("9" * 301, None)],
)  # fmt: skip
def test_numbers(text: str, number: Fraction | None) -> None:
    assert number_of(text) == number


@given(st.decimals(-(10**9), 10**9, places=3))
def test_every_number_is_read(number: Any) -> None:
    assert number_of(f"{number:f}") == number_of(f"{number:,f}") == Fraction(number)


def test_draws_keep_the_splits_apart_and_reach_all(tmp_path: Path) -> None:
    records = [{"question": f"{n}?", "answer": str(n)} for n in range(200)]
    task = FileTask(written(tmp_path, *records))
    train, test = task.of_split("train"), task.of_split("test")
    assert len(train) + len(test) == 200
    assert 10 < len(test) < 40
    drawn = {problem_at(task, 1, "test", index).key for index in range(100)}
    assert drawn <= {problem.key for problem in test}
    assert len(drawn) > len(test) / 2
    assert task.draw(Random(5)) == FileTask(task.path).draw(Random(5))


def test_the_same_question_in_another_file_is_on_the_same_side(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    for n in range(40):
        a = FileTask(written(one, {"question": f"What is {n}?", "answer": "1"}))
        b = FileTask(written(two, {"question": f" what IS\n{n}?", "answer": "1"}))
        assert a.problems[0].split == b.problems[0].split


@pytest.mark.parametrize("record", [HUMAN_EVAL, MBPP, PROGRAM])
def test_the_tests_in_the_facts_judge_the_programs(tmp_path: Path, record: dict[str, Any]) -> None:
    task = FileTask(written(tmp_path, record))
    (problem,) = task.problems
    assert task.judged_by == "code"
    assert problem.facts == json.loads(json.dumps(problem.facts))
    right = problem.answer or "def three(): return 3"
    wrong = right.replace("return ", "return 1 + ")
    for program, status in ((right, 0), (wrong, 1)):
        whole = f"{program}\n{problem.facts['tests']}"
        done = subprocess.run([sys.executable, "-c", whole], capture_output=True, timeout=60)
        assert done.returncode == status, done.stderr
    with pytest.raises(BadInput, match="its answers are programs: judge them by their tests"):
        task.right(right, problem)


def test_questions_say_what_the_tests_need(tmp_path: Path) -> None:
    human = FileTask(written(tmp_path, HUMAN_EVAL)).problems[0]
    assert "def one():" in human.question
    assert human.facts["begin"] == HUMAN_EVAL["prompt"]
    assert human.facts["entry_point"] == "one"
    mbpp = FileTask(written(tmp_path, MBPP)).problems[0]
    assert mbpp.question.startswith("Write two.")
    assert "assert two() == 2\nassert two() > 1" in mbpp.question
    assert mbpp.facts["tests"].startswith("import math\n")
    assert FileTask(written(tmp_path, PROGRAM)).problems[0].facts["entry_point"] == "three"
    whole = FileTask(written(tmp_path, {**PROGRAM, "tests": "x = 1"})).problems[0]
    assert whole.facts["tests"] == "x = 1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        ("[1]", "is no JSON object"),
        ("{}", "is no problem: give 'question' and 'answer', or 'prompt'.*its fields: none"),
        ('{"text": "a", "code": "b"}', "its fields: 'code', 'text'"),
        ('{"question": "a"}', "field 'answer' is no text and no number"),
        ('{"question": "a", "answer": true}', "field 'answer' is no text and no number"),
        ('{"question": "a", "answer": "many"}', "does not end in '#### NUMBER'"),
        ('{"question": "a", "answer": "#### 1\\n#### x"}', "does not end in '#### NUMBER'"),
        ('{"question": "", "answer": "1"}', "field 'question' is empty"),
        ('{"question": 3, "answer": "1"}', "field 'question' is missing or no text"),
        ('{"question": "\\ud800", "answer": "1"}', "field 'question' is missing or no text"),
        ('{"prompt": "a", "test": "b"}', "field 'entry_point' is missing"),
        ('{"prompt": "a", "tests": []}', "field 'tests' is empty"),
        ('{"prompt": "a", "tests": [1]}', "field 'tests' is no list of texts"),
        ('{"prompt": "a", "tests": {}}', "field 'tests' is no list of texts"),
        ('{"prompt": "a", "tests": "b", "entry_point": 1}', "field 'entry_point' is missing or no"),
        ('{"text": "a", "test_list": "b"}', "field 'test_list' is no list of texts"),
        ('{"prompt": "a", "tests": "b"}', "has another shape than the lines before"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    bad = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"question": "1+1?", "answer": "2"}\n\n' + bad + b"\n")
    with pytest.raises(BadInput, match=rf"bad\.jsonl: line 3: .*{message}") as raised:
        FileTask(path)
    assert "\n" not in str(raised.value)


def test_files_that_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(BadInput, match=r"empty\.jsonl: holds no problem"):
        FileTask(tmp_path / "empty.jsonl")
    with pytest.raises(BadInput, match="none: cannot be read: No such file"):
        FileTask(tmp_path / "none")
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        FileTask(tmp_path)


def test_gsm8k_itself() -> None:
    task = FileTask(evals("gsm8k/test.jsonl"))
    assert len(task.problems) == 1319
    assert task.problems[0].answer == "18"
    for problem in task.problems:
        assert task.right(problem.answer, problem)
        assert problem.steps.endswith(problem.answer)
        assert "<<" not in problem.steps


@pytest.mark.parametrize(
    ("name", "count"), [("humaneval/HumanEval.jsonl", 164), ("mbpp/mbpp.jsonl", 974)]
)
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_code_benchmarks_themselves(name: str, count: int) -> None:
    task = FileTask(evals(name))
    assert (len(task.problems), task.judged_by) == (count, "code")
    for problem in task.problems:
        assert problem.answer
        compile(f"{problem.answer}\n{problem.facts['tests']}", "program", "exec")
