"""What the checks of OpenAI's client share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
from openai import OpenAI

from tests.clients.checks.case import Case, Check

HELLO: Any = [{"role": "user", "content": "a whale dives"}]
# Short prompts and answers: the smallest checkpoints have short contexts.
GREEDY: Any = {"max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
SEEDED: Any = {**GREEDY, "temperature": 1, "seed": 7}
LONG = 150


def collector(checks: list[Check]) -> Callable[[Check], Check]:
    """Return a decorator that adds a check to a list."""

    def check(function: Check) -> Check:
        checks.append(function)
        return function

    return check


def client_of(case: Case, **options: Any) -> OpenAI:
    """Return a client of the server that takes any key."""
    given = {"api_key": "anything", "timeout": 60, "max_retries": 0, **options}
    return OpenAI(base_url=f"{case.url}/v1", **given)


def strict_client(case: Case, **options: Any) -> OpenAI:
    """Return a client of the server that wants a key and has room for two answers."""
    given = {"api_key": case.keys[0], "timeout": 60, "max_retries": 0, **options}
    return OpenAI(base_url=f"{case.strict_url}/v1", **given)


def raises(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """Return the error that a call raises, which must be just of this kind."""
    error: openai.OpenAIError | None = None
    try:
        call()
    except openai.OpenAIError as raised:
        error = raised
    assert type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}"
    return error


def ascii_part(text: str, size: int = 2) -> str | None:
    """Return a piece of a text, not at its beginning, that no token of half a character spoils."""
    for at in range(3, len(text) - size):
        piece = text[at : at + size]
        if piece.isascii() and piece.isprintable() and piece.strip() == piece:
            return piece
    return None


def chat(client: OpenAI, **more: Any) -> Any:
    """Answer the one conversation, by whatever model is there."""
    return client.chat.completions.create(**{"model": None, "messages": HELLO, **more})


def gathered(chunks: list[Any], index: int = 0) -> tuple[str, str, list[str]]:
    """Return role, content and finish reasons of one answer of a stream."""
    mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
    role = "".join(c.delta.role or "" for c in mine)
    content = "".join(c.delta.content or "" for c in mine)
    return role, content, [c.finish_reason for c in mine if c.finish_reason is not None]
