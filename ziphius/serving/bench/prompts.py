"""Prompts for a load: from a file, or made up in a given length."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ziphius.config.errors import BadInput

WORDS = """
whale deep water light song cold slow long small wide blue dark north south under over
between through every other first second many few river stone paper number letter signal
engine wheel garden winter summer morning evening people window table market island
harbour bridge mountain forest science history question answer reason measure count carry
follow listen travel gather build open close begin finish remember describe explain and or
but because while where when the a this that with from into about after before against
""".split()  # noqa: SIM905  # a list of them is a page

Kind = Literal["text", "messages", "ids"]


class Prompt(NamedTuple):
    """A prompt: text, a list of messages, or token ids."""

    kind: Kind
    value: Any

    @property
    def shown(self) -> str:
        """Its beginning, as one line."""
        text = self.value if self.kind == "text" else json.dumps(self.value, ensure_ascii=False)
        line = " ".join(text.split())
        return line if len(line) <= 60 else f"{line[:59]}…"


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts, one a line: JSON objects with ``prompt`` or ``messages``, or text.

    It is JSON where the first line begins with a brace. Raises BadInput for what can't be read.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts {path}: cannot be read: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise BadInput(f"--prompts {path}: holds no prompt: write one a line")
    if not lines[0][1].lstrip().startswith("{"):
        return [Prompt("text", line.removesuffix("\r")) for _, line in lines]
    return [_parse(line, f"--prompts {path}, line {number}") for number, line in lines]


def _parse(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: is no JSON: {error}") from None
    known = isinstance(record, dict) and [k for k in ("prompt", "messages") if k in record]
    if not known or len(known) > 1:
        raise BadInput(f"{where}: needs either 'prompt' or 'messages'")
    value = record[known[0]]
    if known == ["messages"]:
        if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
            return Prompt("messages", value)
        raise BadInput(f"{where}: messages are a list of objects with 'role' and 'content'")
    if isinstance(value, str) and value:
        return Prompt("text", value)
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return Prompt("ids", value)
    raise BadInput(f"{where}: a prompt is text or a list of token ids")


def make_text(number: int, words: int, seed: int) -> str:
    """Make up the ``number``-th text of so many words; texts differ from their first word on."""
    chosen = random.Random(f"{seed} {number}")
    return " ".join([f"{number + 1}.", *chosen.choices(WORDS, k=max(1, words - 1))])


def require_taken(prompts: Sequence[Prompt], endpoint: str) -> None:
    """Raise BadInput for prompts that an endpoint doesn't take."""
    wrong = {"chat": "ids", "completions": "messages"}[endpoint]
    for number, prompt in enumerate(prompts, 1):
        if prompt.kind == wrong:
            other = "completions" if endpoint == "chat" else "chat"
            what = "token ids" if wrong == "ids" else "messages"
            raise BadInput(f"prompt {number} has {what}: use --endpoint {other}")
