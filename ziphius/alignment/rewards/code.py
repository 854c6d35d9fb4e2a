"""Programs, judged by running a problem's tests on them in the sandbox."""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ziphius.alignment.rewards.reward import Response, Reward
from ziphius.config.errors import BadInput
from ziphius.evaluation.sandbox import Limits, Outcome, run_program

Run = Callable[..., Outcome]
Worth = Literal["all", "share"]

# An opening fence, its language, the content; the same fence closes it.
_FENCED = re.compile(
    r"^[ ]{0,3}(`{3,}|~{3,})[ \t]*(\w*)[^\n]*\n(.*?)^[ ]{0,3}\1[ \t]*$", re.M | re.S
)
_PYTHON = ("python", "python3", "py")

# Runs in the cage. Each test that passed is answered by its word, which is read only then, so
# that a program that ends early, or prints what it likes, has said none of them.
_JUDGE = """
import json, os, sys, types


def judge():
    words, told = os.fdopen(os.dup(0)), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    candidates, tests = json.loads(words.readline())
    for candidate in candidates:
        try:
            program = compile(candidate, "program.py", "exec", dont_inherit=True)
            break
        except (SyntaxError, ValueError):
            continue
    else:
        return
    module = types.ModuleType("program")
    sys.modules["program"] = module
    exec(program, module.__dict__)
    for source, counts in tests:
        try:
            exec(compile(source, "test.py", "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            passed = False
        else:
            passed = True
        word = words.readline() if counts else ""
        if passed:
            os.write(told, word.encode())


judge()
"""


@dataclass(frozen=True)
class _Case:
    """What a program must print for an input."""

    stdin: str
    stdout: str


def program_of(text: str) -> str | None:
    """Return the last fenced block of Python in a text, else the last without a language."""
    found: dict[str, str | None] = {"named": None, "plain": None}
    for match in _FENCED.finditer(text):
        language = match[2].lower()
        if language in _PYTHON:
            found["named"] = match[3]
        elif not language:
            found["plain"] = match[3]
    return found["plain"] if found["named"] is None else found["named"]


def program_passes(
    *, worth: Worth = "all", limits: Limits | None = None, run: Run = run_program
) -> Reward:
    """Return a reward from 0 to 1 for the program in a response, by its problem's tests.

    The problem's ``facts`` have ``tests``, statements in Python of which each ``assert`` and each
    call counts as one test, run in order in one process and under one limit, so that one that
    never ends fails those after it; or ``cases``, a list of ``{"stdin", "stdout"}``, each run for
    itself and equal but for blanks at the ends of lines; or both. ``begin`` is code that the
    program may continue. "all" is worth 1 where every test passed and else 0, "share" the share.

    A response that is unfinished or has no program is worth 0, as is whatever a program does. A
    program that searches its own interpreter for the judge could claim to have passed: the cage
    keeps it from everything else. Raises BadInput, when asked, for a problem without tests.
    """

    def reward(response: Response) -> float:
        begin, tests, cases = _tests(response)
        program = program_of(response.summary) if response.finished else None
        if program is None:
            return 0.0
        passed = _passed(run, limits, [begin + "\n" + program, program], tests) if tests else 0
        for case in cases:
            if worth == "all" and passed < len(tests):
                break
            outcome = run(program, stdin=case.stdin, limits=limits)
            passed += outcome.status == "ok" and _lines(outcome.stdout) == _lines(case.stdout)
        share = passed / (sum(counts for _, counts in tests) + len(cases))
        return share if worth == "share" else float(share == 1)

    return reward


def _passed(
    run: Run, limits: Limits | None, candidates: list[str], tests: list[tuple[str, bool]]
) -> int:
    """Run statements after the first candidate that is Python; return how many tests passed."""
    words = [secrets.token_hex(8) for _, counts in tests if counts]
    order = json.dumps([candidates, tests])
    outcome = run(_JUDGE, stdin="\n".join([order, *words]) + "\n", limits=limits)
    said = outcome.stdout.split()
    return sum(word in said for word in words)


def _tests(response: Response) -> tuple[str, list[tuple[str, bool]], list[_Case]]:
    problem = response.problem
    facts, name = problem.facts, f"problem {problem.key[:60]!r} of task {problem.task}"
    if facts.get("language", "python") != "python":
        raise BadInput(f"{name}: programs in {facts['language']} are not run: use Python")
    begin, code = facts.get("begin") or "", facts.get("tests") or ""
    if not isinstance(begin, str) or not isinstance(code, str):
        raise BadInput(f"{name}: facts 'begin' and 'tests' are no texts: repair the record")
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"{name}: its tests are no Python ({error}): repair the record") from None
    tests = [(ast.unparse(one), _is_test(one)) for one in statements]
    cases = [_case(case, name) for case in facts.get("cases") or ()]
    if not cases and not any(counts for _, counts in tests):
        raise BadInput(f"{name}: no test says what a program must do: give 'tests' or 'cases'")
    return begin, tests, cases


def _is_test(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assert) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    )


def _case(case: Any, name: str) -> _Case:
    if isinstance(case, Mapping):
        stdin, stdout = case.get("stdin"), case.get("stdout")
        if isinstance(stdin, str) and isinstance(stdout, str):
            return _Case(stdin, stdout)
    raise BadInput(f"{name}: a case is no object with texts 'stdin' and 'stdout': repair it")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
