"""Conversations for a small model's first chats where no others are at hand.

What a function is for, as its own docstring says; and several questions one after another.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Any

from ziphius.data.documents import Document

_QUESTIONS = (
    "What does {name} in {module} do?",
    "What is {module}.{name} for?",
    "Explain {name} of {module}.",
)
_LONGEST = 120  # characters of an answer: one sentence
_TURNS = (2, 3)


def docstring_chats(
    documents: Iterable[Document], count: int, *, seed: int
) -> list[dict[str, Any]]:
    """Return up to ``count`` records about functions and classes of modules, drawn by ``seed``.

    Each asks for one of them and answers by the first line of its docstring. Files that are no
    Python of this interpreter's, private names and long lines are left out.
    """
    random = Random(f"chats/{seed}")
    found = [
        (document.name.removesuffix(".py").replace("/", "."), *told)
        for document in documents
        for told in _documented(document.text)
    ]
    random.shuffle(found)
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": random.choice(_QUESTIONS).format(name=name, module=module),
                },
                {"role": "assistant", "content": line},
            ]
        }
        for module, name, line in found[:count]
    ]


def dialogues(records: Sequence[dict[str, Any]], count: int, *, seed: int) -> list[dict[str, Any]]:
    """Return ``count`` records, each of two or three of the given ones told one after another.

    Who has only seen first questions answers no second one: earlier answers, without their
    reasoning, are before it. Fewer records than turns give none.
    """
    random = Random(f"dialogues/{seed}")
    if len(records) < max(_TURNS):
        return []
    drawn = [random.sample(records, random.choice(_TURNS)) for _ in range(count)]
    return [{"messages": [m for record in some for m in record["messages"]]} for some in drawn]


def _documented(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the docstring's first line of what a module defines."""
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in module.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        first, _, _ = (ast.get_docstring(node) or "").partition("\n")
        if not node.name.startswith("_") and 0 < len(first) <= _LONGEST:
            yield node.name, first
