"""Levels of load, one after the other: so many requests at a time, or so many a second."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ziphius.config.errors import ZiphiusError
from ziphius.serving.bench.load import Client
from ziphius.serving.bench.measure import Goal, Summary, summarise
from ziphius.serving.bench.outcome import Outcome
from ziphius.serving.bench.prompts import Prompt, make_text
from ziphius.serving.bench.texts import Texts

OnRequest = Callable[["Level", int, Outcome], None]
OnLevel = Callable[["Level", Summary], None]


@dataclass(frozen=True)
class Level:
    """``requests`` in all: ``concurrency`` at a time, each followed by the next (a closed loop), or
    ``rate`` a second, whatever has become of the others (an open loop).
    """

    requests: int
    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """The load in a word."""
        return f"{self.rate:g}/s" if self.rate is not None else f"{self.concurrency}"


async def sweep(
    client: Client,
    prompts: Sequence[Prompt],
    levels: Sequence[Level],
    *,
    goal: Goal,
    texts: Texts,
    seed: int = 0,
    on_request: OnRequest = lambda level, done, outcome: None,
    on_level: OnLevel = lambda level, summary: None,
) -> list[Summary]:
    """Run the levels in order; each asks the same prompts in the same order."""
    summaries = []
    for level in levels:
        computed = time.process_time()
        began = time.monotonic()
        outcomes = await run_level(client, prompts, level, seed=seed, on_request=on_request)
        wall = max(time.monotonic() - began, 1e-9)
        summary = summarise(
            outcomes,
            goal=goal,
            busy=(time.process_time() - computed) / wall,
            concurrency=level.concurrency,
            rate=level.rate,
        )
        texts.add(outcomes, prompts)
        summaries.append(summary)
        on_level(level, summary)
    return summaries


async def run_level(
    client: Client,
    prompts: Sequence[Prompt],
    level: Level,
    *,
    seed: int = 0,
    on_request: OnRequest = lambda level, done, outcome: None,
) -> list[Outcome]:
    """Send a level's requests; return what became of each, in the order of their ends."""
    outcomes: list[Outcome] = []

    async def ask(number: int, due: float | None = None) -> None:
        place = number % len(prompts)
        outcomes.append(await client.ask(place, prompts[place], due))
        on_request(level, len(outcomes), outcomes[-1])

    async with asyncio.TaskGroup() as tasks:
        if level.rate is not None:
            start = time.monotonic()
            for number, after in enumerate(arrivals(level.rate, level.requests, seed)):
                due = start + after
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.create_task(ask(number, due))
        else:
            numbers = iter(range(level.requests))

            async def stream() -> None:
                for number in numbers:
                    await ask(number)

            for _ in range(min(level.concurrency or 1, level.requests)):
                tasks.create_task(stream())
    return outcomes


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Return when requests come, in seconds after the first: Poisson, ``rate`` a second on average.

    The same seed gives the same pattern at every rate, denser or thinner.
    """
    chosen = random.Random(seed)
    times, at = [], 0.0
    for _ in range(count):
        times.append(at)
        at += chosen.expovariate(1.0) / rate
    return times


async def make_prompts(client: Client, count: int, tokens: int, seed: int) -> list[Prompt]:
    """Make up prompts of about ``tokens`` tokens.

    Where the server has ``/tokenize`` completions get exactly so many token ids, and a chat gets a
    text that has about so many words for so many tokens; elsewhere a word stands for a token.
    """
    prompts = []
    known = await client.tokenize(make_text(0, tokens, seed))
    for number in range(count):
        text = make_text(number, tokens, seed)
        if known is None:
            prompts.append(Prompt("text", text))
        elif client.asking.endpoint == "completions":
            prompts.append(Prompt("ids", await _ids(client, number, tokens, seed)))
        else:
            words = round(tokens * tokens / len(known))
            prompts.append(Prompt("text", make_text(number, words, seed)))
    return prompts


async def _ids(client: Client, number: int, tokens: int, seed: int) -> list[int]:
    words = tokens
    while ids := await client.tokenize(make_text(number, words, seed)):
        if len(ids) >= tokens:
            return ids[:tokens]
        words *= 2
    raise ZiphiusError(f"{client.url}/tokenize: gives no tokens any more: give a file of --prompts")
