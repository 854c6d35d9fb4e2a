"""Arithmetic that somebody else wrote, evaluated exactly and without running it."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

_LONGEST = 200
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_BLANK_IN_NUMBER = re.compile("(?<=[0-9]) +(?=[0-9])")
_SPELLINGS = (
    ("\u2212", "-"), ("\u00d7", "*"), ("\u00b7", "*"), ("\u00f7", "/"),
    (r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), (r"\left", ""), (r"\right", ""),
)  # fmt: skip
_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = (
    MappingProxyType(
        {
            ast.Add: operator.add,
            ast.Sub: operator.sub,
            ast.Mult: operator.mul,
            ast.Div: operator.truediv,
        }
    )
)


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the value of an expression and the numbers in it, or None if it has none.

    An expression has whole numbers (their digits may stand apart), ``+ - * /``, parentheses and no
    more than 200 characters; signs of LaTeX and typography are understood.
    """
    for sign, plain in _SPELLINGS:
        text = text.replace(sign, plain)
    text = _BLANK_IN_NUMBER.sub("", text.strip())
    if len(text) > _LONGEST or not _ALLOWED.fullmatch(text):
        return None
    numbers: list[int] = []
    try:
        value = _value(ast.parse(text, mode="eval").body, numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, numbers


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    """Evaluate a node, noting its numbers. Raises ValueError for anything that is no arithmetic."""
    match node:
        case ast.Constant(value=int() as number):
            numbers.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, numbers)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left, numbers), _value(right, numbers))
    raise ValueError("no arithmetic")
