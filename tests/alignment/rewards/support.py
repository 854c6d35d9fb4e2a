"""Responses for the tests of rewards."""

from __future__ import annotations

import re
from typing import Any

from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.tasks.problem import Problem


def respond(
    text: str, *, answer: str = "", task: str = "t", tokens: int = 0, finished: bool = True,
    **facts: Any,
) -> Response:  # fmt: skip
    """Return a response to a problem of which the test says what matters."""
    problem = Problem(task, "question", answer, key="k", facts=facts)
    return Response(problem, text, tokens, finished)


def boxed(text: str) -> str | None:
    """Return what the last box without braces inside holds: an extractor."""
    found = re.findall(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", text)
    return found[-1] if found else None
