"""Pairs of answers to one prompt, of which one is preferred, from JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ziphius.alignment.lines import read_objects
from ziphius.alignment.records import Dropped, Record, Sample, record_of, samples_of
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import END_THINK
from ziphius.inference.chat import ChatTemplate

Message = Mapping[str, Any]
Messages = list[Message]
_ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Preference:
    """Two conversations that differ in their last message alone, the better one first.

    ``about`` is what else the line holds.
    """

    chosen: Record
    rejected: Record
    about: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """What both answer, in letters."""
        return json.dumps(self.chosen.messages[:-1], sort_keys=True)


@dataclass
class DroppedPairs(Dropped):
    """Pairs that were left out: ``same`` are those whose answers are no different."""

    same: int = 0

    def describe(self) -> dict[str, int]:
        """Return the counts by reason, as a summary has them."""
        return {**super().describe(), "same": self.same}


def read_preferences(sources: Sequence[Path]) -> tuple[list[Preference], str]:
    """Read the pairs of files of JSON lines, and a digest of their bytes.

    A line has ``chosen`` and ``rejected``, each a text, a message of the assistant, or a list of
    messages that ends with one; and ``prompt``, a text or messages (also as ``messages``), unless
    both lists begin with it. So RewardBench and the common sets of preferences are written. There
    may be ``tools``. Raises BadInput that names the file and the line.
    """
    objects, digest = read_objects(sources)
    return [preference_of(value, where) for value, where in objects], digest


def preference_of(value: Mapping[str, Any], where: str) -> Preference:
    """Return the pair of one line. Raises BadInput, which names ``where`` it stands."""
    (shared, chosen), (other, rejected) = (_answer(value, name, where) for name in _ANSWERS)
    if list(map(_said, shared)) != list(map(_said, other)):
        raise BadInput(f"{where}: chosen and rejected differ before their last message")
    prompt = _prompt(value, where)
    if list(map(_said, shared[: len(prompt)])) != list(map(_said, prompt)):
        shared = prompt + shared
    shared = shared or prompt
    if not shared:
        raise BadInput(f"{where}: give 'prompt', or lists of messages that begin with it")
    # What was said before is no answer of either.
    before = [{**m, "weight": 0} if m.get("role") == "assistant" else m for m in shared]
    if any(map(_thinks, (chosen, rejected))):
        # Both follow one prompt, in which thinking is begun or not.
        chosen, rejected = map(_thinking, (chosen, rejected))
    known = {"prompt", "messages", *_ANSWERS}
    about = {key: item for key, item in value.items() if key not in known | {"tools"}}
    tools = {"tools": value["tools"]} if "tools" in value else {}
    return Preference(
        record_of({"messages": [*before, chosen], **tools}, f"{where}: chosen"),
        record_of({"messages": [*before, rejected], **tools}, f"{where}: rejected"),
        about,
    )


def pairs_of(
    preferences: Iterable[Preference], template: ChatTemplate, tokenizer: Tokenizer, longest: int
) -> tuple[list[tuple[Sample, Sample]], DroppedPairs]:
    """Return the samples of pairs, and what was dropped: pairs of more than ``longest`` tokens."""
    found, dropped = [], DroppedPairs()
    for preference in preferences:
        samples = (
            sample_of(r, template, tokenizer) for r in (preference.chosen, preference.rejected)
        )
        chosen, rejected = samples
        if chosen is None or rejected is None:
            dropped.empty += 1
        elif chosen.tokens.tolist() == rejected.tokens.tolist():
            dropped.same += 1
        elif len(chosen) + len(rejected) > longest:
            dropped.too_long += 1
        else:
            found.append((chosen, rejected))
    return found, dropped


def sample_of(record: Record, template: ChatTemplate, tokenizer: Tokenizer) -> Sample | None:
    """Return the sample of a conversation's last message; None for one without words.

    Of messages before it none is learned.
    """
    samples, _ = samples_of([record], template, tokenizer, longest=1 << 62)
    return samples[-1] if samples else None


def _answer(value: Mapping[str, Any], name: str, where: str) -> tuple[Messages, Message]:
    """Return what comes before an answer, if the line says it with it, and the answer."""
    said = value.get(name)
    if isinstance(said, str):
        return [], {"role": "assistant", "content": said}
    messages = [said] if isinstance(said, Mapping) else said
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{where}: {name}: give a text, a message, or a list of messages")
    if not all(isinstance(message, Mapping) for message in messages):
        raise BadInput(f"{where}: {name}: messages are objects with 'role' and 'content'")
    if messages[-1].get("role") != "assistant":
        raise BadInput(f"{where}: {name}: the last message must be the assistant's")
    return messages[:-1], messages[-1]


def _prompt(value: Mapping[str, Any], where: str) -> Messages:
    prompt = value.get("prompt", value.get("messages"))
    if prompt is None:
        return []
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(m, Mapping) for m in prompt):
        raise BadInput(f"{where}: prompt: give a text or a list of messages")
    return list(prompt)


def _said(message: Message) -> tuple[Any, Any]:
    return message.get("role"), message.get("content")


def _thinks(message: Message) -> bool:
    content = message.get("content")
    return message.get("reasoning_content") is not None or (
        isinstance(content, str) and END_THINK in content
    )


def _thinking(message: Message) -> Message:
    return message if _thinks(message) else {**message, "reasoning_content": ""}
