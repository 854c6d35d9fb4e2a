"""What a judge is asked, how its words are read, and what several of them decide."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from ziphius.data.tokenizer import END_THINK

Verdict = Literal["first", "second", "tie"]

BEST_GRADE = 10
_PAIR = (
    "You compare two answers to one request. Judge how well each does what was asked: whether it "
    "is right, complete, clear and harmless. Neither their order nor their length is a reason. Say "
    "briefly what speaks for each, then end with one line: [[A]] if answer A is better, [[B]] if "
    "answer B is better, [[C]] if they are equally good."
)
_GRADE = (
    "You grade an answer to a request. Judge how well it does what was asked: whether it is right, "
    "complete, clear and harmless. Say briefly what speaks for and against it, then end with one "
    f"line: the grade as a whole number from 1, useless, to {BEST_GRADE}, perfect, as in [[5]]."
)
_CONSTITUTION = "Judge by these principles before anything else:\n{text}"
_CHOICE = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_NUMBER = re.compile(r"\[\[\s*(\d{1,2})\s*\]\]")

Message = dict[str, str]


@dataclass(frozen=True)
class Choice:
    """What the votes on a pair came to.

    ``winner`` is None where no vote could be read. ``votes`` has one entry a vote, None for one
    that abstained: no answer in time, or none that could be read.
    """

    winner: Verdict | None
    votes: tuple[Verdict | None, ...]


def swapped(seed: int, vote: int, *texts: str) -> bool:
    """Decide whether a vote sees the second answer as A: by the seed and the texts alone."""
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()
    return Random(f"{seed}/{vote}/{digest}").random() < 0.5


def pair_messages(question: str, a: str, b: str, constitution: str = "") -> list[Message]:
    """Return the chat that asks which of two answers is better."""
    asked = f"# Request\n\n{question}\n\n# Answer A\n\n{a}\n\n# Answer B\n\n{b}"
    return _messages(_PAIR, asked, constitution)


def grade_messages(question: str, answer: str, constitution: str = "") -> list[Message]:
    """Return the chat that asks for an answer's grade."""
    return _messages(_GRADE, f"# Request\n\n{question}\n\n# Answer\n\n{answer}", constitution)


def _messages(task: str, asked: str, constitution: str) -> list[Message]:
    principles = f"\n\n{_CONSTITUTION.format(text=constitution)}" if constitution.strip() else ""
    return [
        {"role": "system", "content": task + principles},
        {"role": "user", "content": asked},
    ]


def read_choice(text: str, *, swap: bool) -> Verdict | None:
    """Return the last verdict in a judge's words, its reasoning left out; None without one."""
    found = _CHOICE.findall(text.rpartition(END_THINK)[2])
    if not found:
        return None
    if found[-1] == "C":
        return "tie"
    return "first" if (found[-1] == "A") != swap else "second"


def read_grade(text: str) -> float | None:
    """Return the last grade in a judge's words as a number from 0 to 1; None without one."""
    found = _NUMBER.findall(text.rpartition(END_THINK)[2])
    if not found or not 1 <= int(found[-1]) <= BEST_GRADE:
        return None
    return (int(found[-1]) - 1) / (BEST_GRADE - 1)


def majority(votes: Sequence[Verdict | None]) -> Verdict | None:
    """Return what most votes are for; a tie where the two answers have equally many.

    Votes for a tie count only where they outnumber those for each answer. None without votes.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return None
    first, second = counts["first"], counts["second"]
    if first == second or counts["tie"] > max(first, second):
        return "tie"
    return "first" if first > second else "second"
