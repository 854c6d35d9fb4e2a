"""An engine with a model that is a hash, to run the scheduler's steps for real, but quickly.

The row of a position is a hash of all rows before it, read through the pages, and of its token. So
a row that is stale, foreign or overwritten changes every token after it. Besides there is a second
store for MTP: the row of a position is a hash of the hidden state before it and of its token.
"""

from __future__ import annotations

import random
from collections import Counter

from ziphius.inference.scheduler import Scheduler
from ziphius.inference.sequence import Chunk, Sequence, Step

VOCABULARY, STOP = 12, 0
GARBAGE, TOKEN, HIDDEN = -1, -2, -3


def row(past: list[int], token: int) -> int:
    return hash((*past, token))


def choose(state: int, seed: int) -> int:
    return hash((state, seed, TOKEN)) % VOCABULARY


def rows(tokens: list[int]) -> list[int]:
    """Return the row of each position: what the cache must hold."""
    result: list[int] = []
    for token in tokens:
        result.append(row(result, token))
    return result


def answer(prompt: list[int], max_tokens: int, seed: int) -> list[int]:
    """Return the output that a request must get, whatever happens around it."""
    past, output = rows(prompt), []
    while len(output) < max_tokens:
        output.append(choose(past[-1], seed))
        if output[-1] == STOP:
            break
        past.append(row(past, output[-1]))
    return output


class Engine:
    """Runs steps. It proposes up to ``depth`` drafts, each wrong in one of three times."""

    def __init__(self, scheduler: Scheduler, rng: random.Random, depth: int = 0) -> None:
        self.scheduler, self.rng, self.depth = scheduler, rng, depth
        pool = scheduler.pool
        self.rows = [GARBAGE] * (pool.n_pages * pool.page_size)
        self.mtp = [GARBAGE] * (pool.n_pages * pool.page_size)
        self.hidden: dict[Sequence, tuple[int, int]] = {}  # of the last position computed
        self.scores: dict[Sequence, dict[int, int]] = {}
        self.happened: Counter[str] = Counter()

    def compute(self, step: Step) -> tuple[dict[Sequence, list[int]], set[Sequence]]:
        """Return the tokens chosen, and who has finished."""
        assert len(step) <= self.scheduler.max_step_tokens
        size = self.scheduler.pool.page_size
        for store in (self.rows, self.mtp):
            for source, target in step.copies:
                store[target * size : target * size + size] = store[source * size :][:size]
        for sequence in step.preempted:
            self.hidden.pop(sequence, None)
        confirmed: dict[Sequence, list[int]] = {}
        finished: set[Sequence] = set()
        # In any order: what one chunk writes, no other may read.
        for chunk in self.rng.sample(step.chunks, len(step.chunks)):
            states = self.feed(chunk)
            new, done = self.sample(chunk, states)
            if new:
                confirmed[chunk.sequence] = new
            if done:
                finished.add(chunk.sequence)
        return confirmed, finished

    def feed(self, chunk: Chunk) -> list[int]:
        """Write the chunk's rows; return the state of each of its positions."""
        sequence, pages = chunk.sequence, chunk.table.pages
        size = self.scheduler.pool.page_size
        assert chunk.start == sequence.computed
        assert len(chunk.tokens) == len(chunk.slots) > 0
        assert (
            chunk.tokens == (sequence.tokens + sequence.drafts)[chunk.start :][: len(chunk.tokens)]
        )
        at = [page * size + offset for page in pages for offset in range(size)]
        last, hidden = self.hidden.pop(sequence, (-1, 0))
        known = last == chunk.start - 1 >= 0
        states = []
        for position, (token, slot) in enumerate(
            zip(chunk.tokens, chunk.slots, strict=True), chunk.start
        ):
            past = [self.rows[place] for place in at[:position]]
            state = row(past, token)
            if slot < 0:
                assert self.rows[at[position]] == state, "not written, and not there"
            else:
                assert slot == at[position]
                self.rows[slot] = state
            if self.scheduler.recompute and position:
                if slot >= 0:
                    assert known, "the hidden state before the position is unknown"
                    self.mtp[slot] = hash((hidden, token))
                tokens = sequence.tokens + chunk.tokens[len(chunk.tokens) - chunk.drafts :]
                expected = [
                    hash((hash((before, HIDDEN)), token))
                    for before, token in zip(past, tokens[1 : position + 1], strict=True)
                ]
                assert [self.mtp[place] for place in at[1 : position + 1]] == expected
            hidden, known = hash((state, HIDDEN)), True
            states.append(state)
        return states

    def sample(self, chunk: Chunk, states: list[int]) -> tuple[list[int], bool]:
        """Choose tokens as far as the chunk's logits and drafts allow."""
        sequence = chunk.sequence
        for place in range(len(states) - chunk.logits, len(states)):
            if (position := chunk.start + place) < sequence.prompt_length:
                self.scores.setdefault(sequence, {})[position] = states[place]
        if not chunk.ends:
            assert not chunk.drafts
            self.hidden[sequence] = (
                chunk.start + len(states) - 1, hash((states[-1], HIDDEN))
            )  # fmt: skip
            return [], False
        drafts = chunk.tokens[len(chunk.tokens) - chunk.drafts :]
        assert chunk.logits > chunk.drafts
        new: list[int] = []
        done = len(sequence.tokens) == sequence.max_length
        for place, draft in enumerate([*drafts, None]):
            if done:
                break
            state = states[len(states) - 1 - chunk.drafts + place]
            new.append(choose(state, sequence.index))
            done = new[-1] == STOP or len(sequence.tokens) + len(new) == sequence.max_length
            self.hidden[sequence] = (len(sequence.tokens) + place - 1, hash((state, HIDDEN)))
            if new[-1] != draft:
                break
            self.happened["accepted"] += 1
        self.happened["rejected"] += len(drafts) - (len(new) - 1 if new else 0)
        return new, done

    def propose(self, sequence: Sequence) -> None:
        """Set drafts: the right tokens, or others."""
        tokens = list(sequence.tokens)
        for _ in range(self.rng.randint(0, self.depth)):
            token = choose(rows(tokens)[-1], sequence.index)
            if self.rng.random() < 1 / 3:
                token = self.rng.randrange(1, VOCABULARY)
            tokens.append(token)
        sequence.drafts = tokens[len(sequence.tokens) :]

    def finish_step(
        self, step: Step, confirmed: dict[Sequence, list[int]], finished: set[Sequence]
    ) -> None:
        self.scheduler.update(step, confirmed, finished)
        for chunk in step.chunks:
            if chunk.ends and chunk.sequence.state == "running":
                self.propose(chunk.sequence)

    def step(self, now: float = 0.0) -> Step:
        step = self.scheduler.schedule(now)
        self.finish_step(step, *self.compute(step))
        self.scheduler.check()
        return step

    def drain(self, most: int = 10_000) -> None:
        """Step until nothing is left. ``most`` steps must do."""
        for _ in range(most):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle, "requests are left"
        assert self.scheduler.pool.used == 0
