"""The final answer of a response, and the plain form in which answers are compared.

Every function is pure, and linear in the text: a model may write anything at any length.
"""

from __future__ import annotations

import re

# Group 1 is there for an opened box.
_BRACES = re.compile(r"(\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_SAID = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[ \t]*[:=]?(?:\*\*(?=\s))?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s)")
_INTRODUCTION = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|my)\s+)?(?:final\s+)?"
    r"answer(?:\s+is\b|\s*[:=])\s*[:=]?",
    re.IGNORECASE,
)
# What may stand around an answer and says nothing: marks of LaTeX and Markdown.
_WRAPPINGS = (
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\text{", "}"),
    ("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'), ("<answer>", "</answer>"),
)  # fmt: skip
_WHOLE = re.compile(r"([+-]?) ?([0-9]+|[1-9](?: [0-9])+|[0-9]{1,3}(?:,[0-9]{3})+)")
_MOST_LAYERS = 6
# No task asks for longer ones, and Python refuses to read numbers of thousands of digits.
_LONGEST_NUMBER = 400


def final_answer(text: str) -> str:
    r"""Return what a text gives as its answer: a response without its reasoning.

    That is the content of the last ``\boxed{...}``, else of the last ``<answer>...</answer>``, else
    what follows the last "answer is" or "answer:" on its line, else the last line.
    """
    if (boxed := last_boxed(text)) is not None:
        return boxed.strip()
    if (tagged := _last_tagged(text)) is not None:
        return tagged.strip()
    ends = [said.end() for said in _SAID.finditer(text)]
    if ends and (rest := text[ends[-1] :].lstrip()):
        line = rest.splitlines()[0]
        return _SENTENCE_END.split(line, maxsplit=1)[0].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def last_boxed(text: str) -> str | None:
    r"""Return the content of the ``\boxed{...}`` that closes last, or None. Braces may nest."""
    opened: list[int | None] = []
    found = None
    for match in _BRACES.finditer(text):
        if match[1]:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                found = start, match.start()
    return text[found[0] : found[1]] if found else None


def _last_tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def bare_answer(text: str) -> str:
    r"""Return an answer without what may stand around it.

    That is: blanks, "the answer is" before it, a period after it, a ``\boxed{}`` or marks of LaTeX
    or Markdown around all of it. Nothing is cut out of an answer that says more.
    """
    for _ in range(_MOST_LAYERS):
        text = text.strip()
        introduction = _INTRODUCTION.match(text)
        text = text[introduction.end() :] if introduction else text
        text = _without_wrapping(text.strip().removesuffix("."))
    return text.strip()


def _without_wrapping(text: str) -> str:
    text = text.strip()
    opening = re.match(r"\\boxed\s*\{", text)
    if opening and text.endswith("}") and last_boxed(text) == text[opening.end() : -1]:
        return text[opening.end() : -1]
    for before, after in _WRAPPINGS:
        if len(text) > len(before + after) and text.startswith(before) and text.endswith(after):
            inner = text[len(before) : -len(after)]
            if before not in inner and after not in inner:
                return inner
    return text


def whole_number(text: str) -> int | None:
    """Read a whole number, or return None: ``-12``, ``1,234``, or digits with blanks ``1 2``.

    Two numbers with a blank between them are none: ``12 34``.
    """
    text = text.replace("\u2212", "-")
    match = _WHOLE.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    return int(match[1] + re.sub("[ ,]", "", match[2])) if match else None
