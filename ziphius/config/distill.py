"""The [distill] table: what a teacher's answers are worth keeping for, and how they are learned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ziphius.config.sft import SftConfig

# The words are ours; what they ask for is the report's: reflection and verification (facts 8.1).
REFLECT = "Think step by step, check every step, and correct yourself before you answer."


class DistillConfig(SftConfig):
    """A teacher is asked ``problems`` of ``tasks``, each ``tries`` times, at high ``temperature``.

    Of the answers to a problem that are right and have their form, the ``keep`` shortest become
    records; a problem without any is given up. ``samples`` are the records of a problem: what was
    kept (``final``), or both that make an expert (``expert``): the problem with its original
    answer, and ``system``, the problem and the teacher's answer. ``source`` are the records that
    the student learns, as in [sft]; with ``kl_weight`` it also learns what a teacher thinks of
    every token of them, at ``kl_temperature``.
    """

    tasks: str = ""
    problems: int = Field(1000, ge=1)
    tries: int = Field(8, ge=1)
    keep: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0)
    max_tokens: int = Field(2048, ge=1)
    samples: Literal["final", "expert"] = "final"
    system: str = REFLECT
    kl_weight: float = Field(0.0, ge=0, le=1)
    kl_temperature: float = Field(1.0, gt=0)
