"""Schedulers for tests, and what an answer must be."""

from __future__ import annotations

import random

from tests.inference.simulation import Engine, answer
from ziphius.inference.pages import PagePool
from ziphius.inference.scheduler import Scheduler
from ziphius.inference.sequence import Sequence, Step


def scheduler(
    n_pages: int = 64, page_size: int = 4, *, reuse: bool = True, **limits: int
) -> Scheduler:
    return Scheduler(PagePool(n_pages, page_size, reuse=reuse), **limits)


def engine(n_pages: int = 64, page_size: int = 4, *, depth: int = 0, **limits: int) -> Engine:
    return Engine(scheduler(n_pages, page_size, **limits), random.Random(0), depth)


def expect_answer(sequence: Sequence) -> None:
    prompt = sequence.tokens[: sequence.prompt_length]
    most = sequence.max_length - sequence.prompt_length
    assert sequence.output == answer(prompt, most, sequence.index)


def fed(step: Step) -> list[tuple[int, int]]:
    """Return (start, tokens fed) of each chunk."""
    return [(chunk.start, len(chunk.tokens)) for chunk in step.chunks]


PROMPT = [5, 3, 8, 1, 9, 2, 7, 4, 6, 11, 10]
