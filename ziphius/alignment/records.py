"""Conversations from JSON lines, as tokens of which those that the assistant wrote are learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ziphius.alignment.lines import read_objects
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import BOS_ID, END_THINK, EOS, THINK
from ziphius.inference.chat import ChatTemplate, check_messages
from ziphius.inference.formats import opens_reasoning
from ziphius.inference.tools import calls_text


@dataclass(frozen=True)
class Record:
    """One line: a conversation, the tools it may use, and where it stands for messages of errors.

    ``about`` is what else the line holds, such as where a distilled answer came from.
    """

    messages: Sequence[Mapping[str, Any]]
    where: str
    tools: Sequence[Mapping[str, Any]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Tokens int32 ``[n]``, which begin with BOS, and which of them are learned, bool ``[n]``."""

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def content(self) -> bytes:
        """Return all that a sample is, to tell it from others."""
        return self.tokens.tobytes() + self.learned.tobytes()


@dataclass
class Dropped:
    """What was left out, and why."""

    empty: int = 0
    too_long: int = 0

    def describe(self) -> dict[str, int]:
        """Return the counts by reason, as a summary has them."""
        return {"empty": self.empty, "too_long": self.too_long}


def read_records(sources: Sequence[Path]) -> tuple[list[Record], str]:
    """Read the conversations of files of JSON lines, and a digest of their bytes.

    A line has ``messages`` as OpenAI's clients send them, and perhaps ``tools``; or ``prompt`` and
    ``response``. A message of the assistant may have ``reasoning_content``, and ``weight`` 0 where
    it is not to be learned. Raises BadInput that names the file and the line.
    """
    objects, digest = read_objects(sources)
    return [record_of(value, where) for value, where in objects], digest


def samples_of(
    records: Iterable[Record], template: ChatTemplate, tokenizer: Tokenizer, longest: int
) -> tuple[list[Sample], Dropped]:
    """Return what training learns of conversations, and what was dropped.

    Every turn of the assistant follows the prompt that a server would have made, letter for letter:
    so turns that the template writes otherwise later, such as those with reasoning, are samples of
    their own. A turn without words is none. A sample of more than ``longest`` tokens is dropped.
    """
    found, dropped = [], Dropped()
    for record in records:
        for pieces in _pieces(record, template, dropped):
            sample = encode_pieces(pieces, tokenizer)
            if len(sample) > longest:
                dropped.too_long += 1
            else:
                found.append(sample)
    return found, dropped


def written(message: Mapping[str, Any], prompt: str, template: ChatTemplate) -> str:
    """Return the text that a model is to write behind a prompt so that it has said ``message``."""
    content, reasoning = message.get("content") or "", message.get("reasoning_content")
    calls = message.get("tool_calls") or ()
    said = content + (calls_text(calls, template.calls) if calls else "") + EOS
    if opens_reasoning(prompt):
        if reasoning is None and END_THINK in content:
            return content.split(THINK, 1)[-1] + said.removeprefix(content)
        ends = "\n" if prompt.endswith("\n") else ""  # R1's way has lines of their own
        return f"{reasoning or ''}{ends}{END_THINK}{2 * ends}{said}"
    return f"{THINK}{reasoning}{END_THINK}{said}" if reasoning else said


# A stretch of text, and whether it is learned.
Piece = tuple[str, bool]


def _pieces(record: Record, template: ChatTemplate, dropped: Dropped) -> Iterator[list[Piece]]:
    """Yield the samples of a conversation as stretches of text."""
    pieces: list[Piece] = []
    for place, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        if not (message.get("content") or message.get("tool_calls")):
            dropped.empty += 1
            continue
        try:
            prompt = template.render(
                record.messages[:place], tools=record.tools or None, thinking=_thinks(message)
            )
        except BadInput as error:
            raise BadInput(f"{record.where}: {error}") from None
        so_far = "".join(text for text, _ in pieces)
        if not prompt.startswith(so_far) and any(learned for _, learned in pieces):
            yield pieces
        if not prompt.startswith(so_far):
            pieces, so_far = [], ""
        learned = message.get("weight", 1) != 0
        pieces += [(prompt[len(so_far) :], False), (written(message, prompt, template), learned)]
    if any(learned for _, learned in pieces):
        yield pieces


def _thinks(message: Mapping[str, Any]) -> bool:
    content = message.get("content") or ""
    return message.get("reasoning_content") is not None or END_THINK in content


def encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Sample:
    """Encode stretches one by one, as a server encodes a prompt without what will follow."""
    ids: list[int] = []
    learned: list[bool] = []
    for text, counts in pieces:
        new = tokenizer.encode(text, add_special_tokens=False).ids
        if not ids and new[:1] != [BOS_ID]:
            new = [BOS_ID, *new]
        ids += new
        learned += [counts] * len(new)
    return Sample(np.array(ids, np.int32), np.array(learned, np.bool_))


def record_of(value: Mapping[str, Any], where: str) -> Record:
    """Return the conversation of one line. Raises BadInput, which names ``where`` it stands."""
    if "messages" not in value and {"prompt", "response"} <= value.keys():
        said = [("user", value["prompt"]), ("assistant", value["response"])]
        value = {"messages": [{"role": role, "content": text} for role, text in said], **value}
    try:
        messages = check_messages(value.get("messages") or ())
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    for place, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{place}]")
    if all(message["role"] != "assistant" for message in messages):
        raise BadInput(f"{where}: has no message of the assistant: nothing to learn")
    tools = value.get("tools") or ()
    if not isinstance(tools, list | tuple):
        raise BadInput(f"{where}: tools: give a list")
    about = {k: v for k, v in value.items() if k not in ("messages", "tools", "prompt", "response")}
    return Record(messages, where, tools, about)


def _check_message(message: Mapping[str, Any], where: str) -> None:
    """Refuse what the chat's own check lets pass, because a server has no use for it."""
    reasoning, weight = message.get("reasoning_content"), message.get("weight", 1)
    if reasoning is not None and not isinstance(reasoning, str):
        raise BadInput(f"{where}: reasoning_content = {reasoning!r}: give text")
    if weight not in (0, 1):
        raise BadInput(f"{where}: weight = {weight!r}: use 0 or 1")
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not {"name", "arguments"} <= function.keys():
            raise BadInput(f"{where}: a tool call needs 'function' with 'name' and 'arguments'")
