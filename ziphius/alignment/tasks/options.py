"""Multiple choice in the text of a contest problem: its options, and what is left without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

# "(A)", "A)" and "A." as AMC, Odyssey-Math and plain text have them, with the LaTeX around them.
_MARKER = re.compile(
    r"(?:\\(?:textbf|textrm|text|mathrm|mathbf|bf|rm)\b\s*)?\{?\s*"
    r"(?:\(([A-F])\)|(?<![\w\\])([A-F])\)|(?:(?<=\n)|(?<=\A))([A-F])\.(?=\s))"
    r"(?:\s|\\[ ,;:]|~)*\}?"
)
_FEWEST = 3
_SEPARATORS = (
    r"\qquad", r"\quad", r"\hspace{2cm}", "\\\\", r"\ ", r"\,", r"\;", r"\end{align*}",
    r"\begin{align*}", r"\end{problem}", r"\noindent", "$$", "&", "~", ",", ";",
)  # fmt: skip
_LETTER = re.compile(r"(?:\\[a-z]+\s*)?[{(\s]*([A-F])[)}\s.]*")
# Questions that have no answer once the options are gone.
_ABOUT_OPTIONS = re.compile(
    r"\b(?:which|what)\s+(?:one\s+)?(?:of\s+)?(?:the\s+)?(?:following|these|options)\b"
    r"|\bof\s+the\s+following\b|\bfollowing\s+(?:options|choices|statements)\b",
    re.IGNORECASE,
)


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """Return the text before its options and the options by letter; none leaves it as it is.

    Options are at least three marks in the order of the alphabet from A, the last such row.
    """
    marks = [(m, m[1] or m[2] or m[3]) for m in _MARKER.finditer(text)]
    starts = [i for i, (_, letter) in enumerate(marks) if letter == "A"]
    for start in reversed(starts):
        row = [marks[start]]
        for (_, before), (mark, letter) in pairwise(marks[start:]):
            if ord(letter) != ord(before) + 1:
                break
            row.append((mark, letter))
        if len(row) >= _FEWEST:
            ends = [mark.start() for mark, _ in row[1:]] + [len(text)]
            options = {
                letter: plain_value(text[mark.end() : end])
                for (mark, letter), end in zip(row, ends, strict=True)
            }
            return plain_question(text[: row[0][0].start()]), options
    return plain_question(text), {}


def options_of(values: object) -> dict[str, str]:
    """Return the options that a record lists apart: a list, or a mapping from letters."""
    if isinstance(values, Mapping):
        return {str(k).strip().upper(): plain_value(str(v)) for k, v in values.items()}
    if isinstance(values, list):
        texts = [_MARKER.sub("", str(v), count=1) if _MARKER.match(str(v)) else v for v in values]
        return {chr(ord("A") + i): plain_value(str(v)) for i, v in enumerate(texts)}
    return {}


def letter_of(answer: str) -> str | None:
    r"""Return the letter if an answer is one: ``C``, ``(C)``, ``\textbf{(C)}``, ``C.``."""
    match = _LETTER.fullmatch(plain_value(answer))
    return match[1] if match else None


def asks_about_options(question: str) -> bool:
    """Say whether a question makes no sense without its options: "which of the following"."""
    return _ABOUT_OPTIONS.search(question) is not None


def plain_question(text: str) -> str:
    """Return a question without what typesetting leaves at its end, with ``____`` for blanks."""
    text = re.sub(r"\\underline\s*\{\s*\\hspace\*?\{[^{}]*\}\s*\}", "____", text)
    text = _without_ends(text, _SEPARATORS)
    # A dollar that closes nothing opened the options.
    return _without_ends(text.removesuffix("$"), _SEPARATORS) if text.count("$") % 2 else text


def plain_value(text: str) -> str:
    """Return an option or an answer without the separators, dollars and lone braces around it."""
    previous = None
    while text != previous:
        previous = text
        text = _without_ends(text, (*_SEPARATORS, "\\"))
        for start in _SEPARATORS:
            text = text.removeprefix(start)
        if text.count("}") > text.count("{"):
            text = text.removesuffix("}")
        if text.count("$") == 1 or (text.count("$") == 2 and text[0] == text[-1] == "$"):
            text = text.removeprefix("$").removesuffix("$")
    return text


def _without_ends(text: str, ends: tuple[str, ...]) -> str:
    previous = None
    while text != previous:
        previous = text
        text = text.strip()
        for end in ends:
            text = text.removesuffix(end)
    return text
