"""Problems from JSONL files: questions with a number as answer, and programs to write.

A file has one shape throughout:

- GSM8K's: ``question`` and ``answer``, which is a number or a solution that ends in ``#### N``.
- HumanEval's: ``prompt`` (the beginning of a program), ``test`` (a function ``check``) and
  ``entry_point``; ``canonical_solution`` may be there.
- MBPP's: ``text`` or ``prompt``, ``test_list``; ``code``, ``test_setup_code`` and ``test_imports``
  may be there.
- ``prompt`` and ``tests`` (a program, or a list of its parts), with or without ``entry_point``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

from ziphius.alignment.tasks.extract import bare_answer
from ziphius.alignment.tasks.problem import Judge, Problem, Split
from ziphius.config.errors import BadInput
from ziphius.data.clean import is_unicode

PREFIX = "file:"
_MARK = "####"
_CALCULATOR = re.compile("<<[^<>]*>>")
_NUMBER = re.compile(
    r"(-?) ?(?:\\?\$)? ?(-?)"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,300})(?:\.[0-9]{1,300})?)(?: ?\\?%)?"
)
Record = dict[str, Any]


class FileTask:
    """The problems of one file, in its order.

    Raises BadInput that names file and line for anything that is no problem.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = f"{PREFIX}{path}"
        problems, shapes = [], set()
        for where, record in records(self.path):
            judge, read = _shape_of(record, where)
            problems.append(read(record, self.name, where))
            shapes.add(judge)
            if len(shapes) > 1:
                raise BadInput(f"{where}: has another shape than the lines before: split the file")
        if not problems:
            raise BadInput(f"{self.path}: holds no problem: give one JSON object a line")
        self.problems = tuple(problems)
        self._judge: Judge = shapes.pop()

    @property
    def judged_by(self) -> Judge:
        """``code`` where the facts hold tests of a program."""
        return self._judge

    def of_split(self, split: Split) -> list[Problem]:
        """Return all problems of a split, in the file's order."""
        return [problem for problem in self.problems if problem.split == split]

    def draw(self, random: Random) -> Problem:
        """Return some problem of the file."""
        return random.choice(self.problems)

    def right(self, answer: str, problem: Problem) -> bool:
        """Compare numbers. Raises BadInput for a program: its tests judge it."""
        if self._judge == "code":
            raise BadInput(f"task {self.name}: its answers are programs: judge them by their tests")
        number = number_of(bare_answer(answer))
        return number is not None and number == number_of(problem.answer)


def records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield the objects of a JSONL file with the file and line they are at; empty lines are none.

    Raises BadInput, one line, for a file that cannot be read and a line that is no object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}: line {number}"
                    yield where, _object(line, where)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}: check the path") from None


def _object(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(": line 1 ")[0]
        raise BadInput(f"{where}: is not valid JSON: {reason}: repair or remove it") from None
    if not isinstance(record, dict):
        raise BadInput(f"{where}: is no JSON object: repair or remove it")
    return record


def number_of(text: str) -> Fraction | None:
    """Read a number: ``1,234``, ``-0.5``, ``$18``, ``20%``. None for anything else."""
    match = _NUMBER.fullmatch(text.replace("\u2212", "-").strip())
    if not match or (match[1] and match[2]):
        return None
    return Fraction((match[1] or match[2]) + match[3].replace(",", ""))


# Shapes

Reader = Callable[[Record, str, str], Problem]


def _shape_of(record: Record, where: str) -> tuple[Judge, Reader]:
    """Return what judges a record's answer, and its reader."""
    if "test_list" in record:
        return "code", _mbpp
    if "prompt" in record and "test" in record:
        return "code", _human_eval
    if "prompt" in record and "tests" in record:
        return "code", _program
    if "question" in record:
        return "answer", _question
    known = ", ".join(f"'{name}'" for name in sorted(record)) or "none"
    raise BadInput(
        f"{where}: is no problem: give 'question' and 'answer', or 'prompt' and 'tests'; "
        f"its fields: {known}"
    )


def _question(record: Record, task: str, where: str) -> Problem:
    question, given = _text(record, "question", where), record.get("answer")
    if isinstance(given, int | float) and not isinstance(given, bool):
        given = str(given)
    if not isinstance(given, str):
        raise BadInput(f"{where}: field 'answer' is no text and no number: repair or remove it")
    solution, _, last = given.rpartition(_MARK)
    number = number_of(last)
    if number is None:
        raise BadInput(f"{where}: field 'answer' does not end in '{_MARK} NUMBER': repair it")
    answer = last.strip().replace(",", "")
    steps = _CALCULATOR.sub("", solution).strip()
    return Problem(task, question, answer, _key(question), f"{steps}\n{answer}" if steps else "")


def _human_eval(record: Record, task: str, where: str) -> Problem:
    prompt, name = _text(record, "prompt", where), _text(record, "entry_point", where)
    solution = _text(record, "canonical_solution", where, "")
    tests = f"{_text(record, 'test', where)}\ncheck({name})\n"
    facts = {"language": "python", "begin": prompt, "tests": tests, "entry_point": name}
    question = f"Complete this program.\n\n```python\n{prompt.strip()}\n```"
    answer = prompt + solution if solution else ""
    return Problem(task, question, answer, _key(prompt), facts=facts)


def _mbpp(record: Record, task: str, where: str) -> Problem:
    text = _text(record, "text" if "text" in record else "prompt", where)
    asserts = _lines(record, "test_list", where)
    setup = [
        _text(record, "test_setup_code", where, ""),
        *_lines(record, "test_imports", where, []),
    ]
    question = (
        f"{text.strip()} The program must pass:\n\n```python\n" + "\n".join(asserts) + "\n```"
    )
    tests = "\n".join([*filter(None, setup), *asserts]) + "\n"
    facts = {"language": "python", "begin": "", "tests": tests, "entry_point": None}
    return Problem(task, question, _text(record, "code", where, ""), _key(text), facts=facts)


def _program(record: Record, task: str, where: str) -> Problem:
    prompt, tests = _text(record, "prompt", where), record["tests"]
    if not isinstance(tests, str):
        tests = "\n".join(_lines(record, "tests", where)) + "\n"
    name = record.get("entry_point")
    if name is not None:
        name = _text(record, "entry_point", where)
    facts = {"language": "python", "begin": "", "tests": tests, "entry_point": name}
    return Problem(task, prompt, _text(record, "solution", where, ""), _key(prompt), facts=facts)


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _text(record: Record, field: str, where: str, default: str | None = None) -> str:
    value = record.get(field, default)
    if not isinstance(value, str) or not is_unicode(value):
        raise BadInput(f"{where}: field '{field}' is missing or no text: repair or remove the line")
    if default is None and not value.strip():
        raise BadInput(f"{where}: field '{field}' is empty: repair or remove the line")
    return value


def _lines(record: Record, field: str, where: str, default: list[str] | None = None) -> list[str]:
    value = record.get(field, default)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadInput(f"{where}: field '{field}' is no list of texts: repair or remove the line")
    if default is None and not value:
        raise BadInput(f"{where}: field '{field}' is empty: repair or remove the line")
    return value
