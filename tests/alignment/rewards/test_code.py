"""Programs by their tests: what passes, what does not, what cheats."""

from __future__ import annotations

from typing import Any

import pytest

from tests.alignment.rewards.support import respond
from ziphius.alignment.rewards.code import program_of, program_passes
from ziphius.config.errors import BadInput
from ziphius.evaluation.sandbox import Limits, confinement

TESTS = "import math\nassert double(2) == 4\nassert double(-1) == -2\nassert double(0) == 0\n"
RIGHT = "def double(x):\n    return 2 * x\n"
HALF = "def double(x):\n    return x * x\n"


@pytest.fixture(scope="module", autouse=True)
def _caged() -> None:
    found = confinement()
    if not found.possible:
        pytest.skip(found.missing)


def worth(program: str, kind: str = "share", **facts: Any) -> float:
    reward = program_passes(worth=kind, limits=Limits(seconds=2))  # type: ignore[arg-type]
    facts = facts or {"tests": TESTS}
    return reward(respond(f"<think>hm</think>Here:\n```python\n{program}\n```\nDone.", **facts))


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("x\n```py\na\n```\n```Python\nb\n```", "b\n"),
        ("```python\na\n```\n```\nb\n```", "a\n"),
        ("```\na\n```\n```\nb\n```", "b\n"),
        ("~~~python\na\n```\n~~~", "a\n```\n"),
        ("````python\n```\n````", "```\n"),
        ("```json\n{}\n```", None),
        ("```python\nnever closed", None),
        ("def f(): pass", None),
    ],
)
def test_the_last_fenced_program_counts(text: str, program: str | None) -> None:
    assert program_of(text) == program


def test_tests_are_counted() -> None:
    assert worth(RIGHT) == 1.0
    assert worth(HALF) == pytest.approx(2 / 3)
    assert worth(RIGHT, "all") == 1.0
    assert worth(HALF, "all") == 0.0


@pytest.mark.parametrize(
    "program",
    [
        "def double(x)\n    return 2 * x",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "while True: pass",
        "def double(x):\n    while True: pass",
        "def double(x):\n    raise KeyboardInterrupt",
        "def double(x):\n    exit(0)",
        "import os\nos.kill(os.getpid(), 9)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef double(x): return double(x) + 1",
        "x = [0] * 10**12",
        "print('x' * 10**7)",
        "a = '\0'",
        "",
        "(" * 100_000,
    ],
)
def test_no_bad_program_raises_or_passes(program: str) -> None:
    assert worth(program) == 0.0


def test_what_it_prints_is_no_verdict() -> None:
    shouts = "import sys\nfor _ in range(10**5): print('passed'); sys.stderr.write('passed')\n"
    assert worth(shouts + RIGHT) == 1.0
    assert worth(shouts + HALF, "all") == 0.0


def test_a_test_that_never_ends_fails_only_what_follows() -> None:
    program = "def double(x):\n    while x < 0: pass\n    return 2 * x"
    assert worth(program) == pytest.approx(1 / 3)


def test_a_program_may_continue_the_one_it_was_given() -> None:
    begin = 'from typing import List\ndef total(x: List[int]) -> int:\n    """Add."""\n'
    facts = {
        "language": "python", "begin": begin, "entry_point": "total",
        "tests": "def check(f):\n    assert f([1, 2]) == 3\ncheck(total)\n",
    }  # fmt: skip
    assert worth("    return sum(x)", **facts) == 1.0
    assert worth("def total(x: List[int]) -> int:\n    return sum(x)", **facts) == 1.0
    assert worth("    return max(x)", **facts) == 0.0


def test_cases_compare_what_is_printed() -> None:
    cases = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5\n", "stdout": "10"}]
    assert worth("print(sum(map(int, input().split())), ' ')", cases=cases) == 1.0
    assert worth("print(3)", cases=cases) == 0.5
    assert worth("print(3)", "all", cases=cases) == 0.0
    assert worth("print(3)\nexit(1)", cases=cases) == 0.0


def test_what_has_no_program_or_no_end_is_worth_nothing() -> None:
    reward = program_passes()
    assert reward(respond("no program", tests=TESTS)) == 0.0
    text = f"```python\n{RIGHT}```"
    assert reward(respond(text, tests=TESTS)) == 1.0
    assert reward(respond(text, tests=TESTS, finished=False)) == 0.0
    assert reward(respond(f"<think>{text}</think>", tests=TESTS)) == 0.0


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"tests": ""}, "no test says what a program must do"),
        ({"tests": "x = 1\n"}, "no test says what a program must do"),
        ({"tests": "assert ("}, "its tests are no Python"),
        ({"tests": ["assert x"]}, "facts 'begin' and 'tests' are no texts"),
        ({"cases": [{"stdin": "x"}]}, "a case is no object with texts"),
        ({"tests": TESTS, "language": "go"}, "programs in go are not run"),
    ],
)
def test_problems_that_judge_nothing_are_named(facts: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=f"problem 'k' of task t: {words}"):
        worth(RIGHT, **facts)
