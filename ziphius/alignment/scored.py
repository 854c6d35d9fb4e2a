"""Answers with what they are worth, as samples at whose last token a score is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ziphius.alignment.lines import read_objects
from ziphius.alignment.packing import Unit, as_rows
from ziphius.alignment.preferences import DroppedPairs, Preference, preference_of, sample_of
from ziphius.alignment.records import Dropped, Record, Sample, record_of
from ziphius.config.errors import BadInput
from ziphius.config.reward import RewardConfig
from ziphius.data.rows import Batch
from ziphius.data.tokenizer import END_THINK, THINK
from ziphius.inference.chat import ChatTemplate

# By name in ``Batch.fields``: where a score is read, bool, and what the answer is worth there.
READ, WORTH = "read", "worth"


@dataclass(frozen=True)
class ScoredSample(Sample):
    """A conversation, and perhaps the reasoning about it, which alone is learned as text."""

    worth: float = 0.0

    def content(self) -> bytes:
        """Return all that a sample is, to tell it from others."""
        return super().content() + struct.pack("<d", self.worth)


@dataclass(frozen=True)
class Assessed:
    """One line: answers to one prompt, and the reasoning about each; ``worth`` is of a single one.

    ``answers`` are one, or two of which the first is better.
    """

    answers: Sequence[Record]
    reasoning: Sequence[str | None]
    worth: float = 0.0

    @property
    def prompt(self) -> str:
        """What is answered, in letters."""
        return json.dumps(self.answers[0].messages[:-1], sort_keys=True)


def read_judged(sources: Sequence[Path], kind: str) -> tuple[list[Assessed], str]:
    """Read what ``RewardConfig.kind`` asks for from files of JSON lines, and a digest of them.

    Pairs are those of ``read_preferences``, and may have ``reasoning``, an object with ``chosen``
    and ``rejected``. Single answers are conversations as of ``read_records`` that end with the
    assistant's, with ``label`` (0 or 1; ``binary``) or ``score`` (a number; ``regression``), and
    perhaps ``reasoning``. All lines have reasoning or none has. Raises BadInput that names file and
    line.
    """
    objects, digest = read_objects(sources)
    found = [_judged(value, where, kind) for value, where in objects]
    for judged, (_, where) in zip(found, objects, strict=True):
        if (judged.reasoning[0] is None) != (found[0].reasoning[0] is None):
            raise BadInput(
                f"{where}: some records have 'reasoning' and others none: scores are read behind "
                "it, so give it to all or to none"
            )
    return found, digest


def units_of(
    judged: Iterable[Assessed], config: RewardConfig, tokenizer: Tokenizer
) -> tuple[list[Unit], Dropped]:
    """Return the samples of what was judged, side by side, and what was dropped."""
    template, dropped = ChatTemplate(format=config.format), DroppedPairs()
    found: list[Unit] = []
    for one in judged:
        samples = [sample_of(record, template, tokenizer) for record in one.answers]
        spoken = [sample for sample in samples if sample is not None]
        unit = [
            scored(sample, reasoning, one.worth, tokenizer)
            for sample, reasoning in zip(spoken, one.reasoning, strict=False)
        ]
        if len(spoken) < len(samples):
            dropped.empty += 1
        elif len(unit) == 2 and spoken[0].tokens.tolist() == spoken[1].tokens.tolist():
            dropped.same += 1
        elif sum(map(len, unit)) > config.sequence_length:
            dropped.too_long += 1
        else:
            found.append(unit)
    return found, dropped


def scored(
    sample: Sample, reasoning: str | None, worth: float, tokenizer: Tokenizer
) -> ScoredSample:
    """Return a conversation with the reasoning behind it: ``<think>``, then text to be learned."""
    parts, learned = [sample.tokens.tolist()], [False]
    if reasoning is not None:
        texts = (THINK, reasoning + END_THINK)
        parts += [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        learned += [False, True]
    lengths = [len(part) for part in parts]
    return ScoredSample(
        np.array([token for part in parts for token in part], np.int32),
        np.repeat(np.array(learned), lengths),
        worth,
    )


def lay_scored(rows: Sequence[Sequence[Sample]], length: int) -> Batch:
    """Lay samples out in rows, with where their scores are read and what they are worth."""
    batch = as_rows(rows, length)
    read_BS = torch.zeros(batch.tokens_BS.shape, dtype=torch.bool)
    worth_BS = torch.zeros(batch.tokens_BS.shape)
    for place, row in enumerate(rows):
        last = -1
        for sample in row:
            last += len(sample)
            read_BS[place, last] = True
            worth_BS[place, last] = sample.worth if isinstance(sample, ScoredSample) else 0.0
    fields = {**batch.fields, READ: read_BS, WORTH: worth_BS}
    return Batch(batch.tokens_BS, batch.documents_BS, fields)


def _judged(value: Mapping[str, Any], where: str, kind: str) -> Assessed:
    if kind == "pairwise":
        pair = preference_of(value, where)
        return Assessed((pair.chosen, pair.rejected), _reasoning_of_pair(pair, where))
    record = record_of(value, where)
    if record.messages[-1]["role"] != "assistant":
        raise BadInput(f"{where}: the last message must be the assistant's: it is judged")
    # What was said before is not judged.
    before = [{**m, "weight": 0} for m in record.messages[:-1]]
    record = Record([*before, record.messages[-1]], where, record.tools)
    return Assessed((record,), (_text(value.get("reasoning"), where),), _worth(value, where, kind))


def _reasoning_of_pair(pair: Preference, where: str) -> list[str | None]:
    reasoning = pair.about.get("reasoning")
    if reasoning is None:
        return [None, None]
    if not isinstance(reasoning, Mapping) or reasoning.keys() != {"chosen", "rejected"}:
        raise BadInput(f"{where}: reasoning: give an object with 'chosen' and 'rejected'")
    return [_text(reasoning[name], where) or "" for name in ("chosen", "rejected")]


def _text(reasoning: Any, where: str) -> str | None:
    if reasoning is not None and (not isinstance(reasoning, str) or END_THINK in reasoning):
        raise BadInput(f"{where}: reasoning: give text without {END_THINK}")
    return reasoning


def _worth(value: Mapping[str, Any], where: str, kind: str) -> float:
    name = "label" if kind == "binary" else "score"
    worth = value.get(name)
    if (
        isinstance(worth, int | float)
        and math.isfinite(worth)
        and (name == "score" or worth in (0, 1))
    ):
        return float(worth)
    wanted = "0 or 1" if name == "label" else "a number"
    raise BadInput(f"{where}: {name} = {worth!r}: give {wanted}")
