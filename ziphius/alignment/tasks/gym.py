"""The tasks of reasoning-gym, a library of some hundred: ``gym:NAME``.

It is an extra of its own (Apache-2.0). One of its data sets is made for every problem, from a seed:
that is how its problems are many, and how one can be made again for its judge.
"""

from __future__ import annotations

import ast
import re
from random import Random
from typing import Any

from ziphius.alignment.tasks.extract import bare_answer
from ziphius.alignment.tasks.problem import Judge, Problem
from ziphius.config.errors import BadInput
from ziphius.config.table import nearest
from ziphius.data.readers import optional

PREFIX = "gym:"
_NONSENSE = "neither this nor that"
_LONGEST = 4000
# What makes an answer that is no Python dangerous to the library's reader of formulas.
_CALLS = re.compile(r"\w\s*\(|!|lambda|__")
_HIGHEST_POWER = 20
_HARMLESS = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.BinOp, ast.UnaryOp,
    ast.BoolOp, ast.Compare, ast.Call, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_FUNCTIONS = (
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh",
    "exp", "log", "ln", "sqrt", "Abs",
)  # fmt: skip


class GymTask:
    """One of reasoning-gym's data sets with its own settings, judged by its own rule.

    Raises BadInput where the library is not installed, for a name it does not have and for a data
    set that needs settings.
    """

    def __init__(self, dataset: str) -> None:
        self.name = f"{PREFIX}{dataset}"
        what = f"task {self.name}"
        optional("reasoning_gym", "tasks", what)
        self._library: Any = optional("reasoning_gym.factory", "tasks", what)
        known = self._library.DATASETS
        if dataset not in known:
            raise BadInput(f"{what}: reasoning-gym has no '{dataset}'{nearest(dataset, known)}")
        self._dataset = dataset
        try:
            self._made(0)
        except (AssertionError, ValueError) as error:
            raise BadInput(f"{what}: makes no problem by itself: {error}: choose another") from None

    @property
    def judged_by(self) -> Judge:
        """The library's rule judges them."""
        return "answer"

    def draw(self, random: Random) -> Problem:
        """Return a problem. Its answer is empty where the library knows none and can only judge."""
        seed = random.getrandbits(31)
        _, entry = self._made(seed)
        question = str(entry["question"])
        answer = "" if entry["answer"] is None else str(entry["answer"])
        key = " ".join(question.split())
        return Problem(self.name, question, answer, key, facts={"seed": seed})

    def right(self, answer: str, problem: Problem) -> bool:
        """Say whether the answer is the library's, or earns its full mark.

        Some of its rules run the answer as Python. One that could do more than arithmetic is only
        compared. So is every answer where the rule gives nonsense the full mark too, or the answer
        with nonsense after it.
        """
        dataset, entry = self._made(problem.facts["seed"])
        for text in (answer.strip(), bare_answer(answer)):
            if not text:
                return False
            if text == problem.answer.strip():
                return True
            if is_harmless(text) and _full_mark(dataset, entry, text):
                lax = (_NONSENSE, f"{text} {_NONSENSE}")
                return not any(_full_mark(dataset, entry, more) for more in lax)
        return False

    def _made(self, seed: int) -> tuple[Any, dict[str, Any]]:
        dataset = self._library.create_dataset(self._dataset, seed=seed, size=1)
        return dataset, dataset[0]


def _full_mark(dataset: Any, entry: dict[str, Any], answer: str) -> bool:
    """Say whether the library's mark is 1: it has less for half an answer, and slips above 1.

    What its rule cannot read gets none.
    """
    try:
        return bool(dataset.score_answer(answer, entry) == 1)
    except Exception:  # each of its rules has its own way to fail
        return False


def is_harmless(text: str) -> bool:
    """Say whether running it as Python, or reading it with sympy, would do but short arithmetic.

    What is no Python cannot be run at all.
    """
    if len(text) > _LONGEST:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return not _CALLS.search(text)
    except (RecursionError, MemoryError):
        return False
    return all(_is_harmless_node(node) for node in ast.walk(tree))


def _is_harmless_node(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=function, keywords=keywords):
            return isinstance(function, ast.Name) and function.id in _FUNCTIONS and not keywords
        case ast.Constant(value=value):
            return not isinstance(value, int) or value.bit_length() < 200
        case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
            nested = any(isinstance(inner, ast.Pow) for inner in ast.walk(base))
            return not nested and _is_small(exponent)
        case ast.BinOp(op=ast.Mult()):
            return not any(_is_sequence(inner) for inner in ast.walk(node))
        case ast.BinOp(op=ast.LShift() | ast.MatMult() | ast.Mod()):
            return False
    return isinstance(node, _HARMLESS)


def _is_sequence(node: ast.AST) -> bool:
    """Say whether a node makes what a product would repeat."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str | bytes)
    return isinstance(node, ast.List | ast.Tuple)


def _is_small(exponent: ast.expr) -> bool:
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    value = exponent.value if isinstance(exponent, ast.Constant) else None
    return isinstance(value, int) and value <= _HIGHEST_POWER
