"""What is scheduled: a sequence, the chunk of it in a step, the step; and what metrics read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ziphius.config.errors import ZiphiusError
from ziphius.inference.pages import PagePool, PageTable

State = Literal["waiting", "running", "ended"]


class QueueFull(ZiphiusError):
    """The waiting queue is at a limit, ``what``: ``requests`` or ``tokens``. Try again later."""

    def __init__(self, what: Literal["requests", "tokens"], waiting: int, limit: int) -> None:
        super().__init__(
            f"the queue is full: {waiting} {what} wait, the limit is {limit}: try again later"
        )
        self.what, self.waiting, self.limit = what, waiting, limit


class Sequence:
    """One answer in the making. The scheduler changes all but ``drafts`` and ``data``.

    ``tokens`` are the prompt and the output, ``computed`` of them have their rows in the cache.
    ``drafts`` are proposed tokens behind the end; the engine sets them between two steps, and they
    last for one. Prompt positions below ``scored`` need no logits. ``cached``: prompt tokens
    found in the cache when it first ran. ``data`` is the engine's.
    """

    __slots__ = (
        "arrival", "cached", "computed", "data", "deadline", "drafts", "group", "index",
        "max_length", "order", "prompt_length", "scored", "state", "table", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        prompt: list[int],
        max_tokens: int,
        pool: PagePool,
        *,
        arrival: int = 0,
        index: int = 0,
        priority: int = 0,
        salt: bytes = b"",
        deadline: float = float("inf"),
        prompt_logprobs: bool = False,
    ) -> None:
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.max_length = len(prompt) + max_tokens
        self.computed = 0
        self.drafts: list[int] = []
        self.table = PageTable(pool, salt)
        self.state: State = "waiting"
        self.arrival, self.index = arrival, index
        # Who goes first, and whose pages are taken last.
        self.order = (-priority, arrival, index)
        self.deadline = deadline
        self.scored = 0 if prompt_logprobs else len(prompt)
        self.cached = -1
        self.group: list[Sequence] = []  # all n answers to the prompt, itself included, if n > 1
        self.data: Any = None

    @property
    def output(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def load(self) -> int:
        """The tokens that it counts for while it waits: a prompt counts once a request."""
        again = self.index and len(self.tokens) == self.prompt_length
        return 0 if again else len(self.tokens)

    def siblings(self) -> tuple[bool, Sequence | None]:
        """Return whether another answer runs whose prompt this one can use, and one that is ready.

        One with output of its own, which was preempted, goes on alone.
        """
        computing = False
        if len(self.tokens) == self.prompt_length:
            for other in self.group:
                if other.state == "running":
                    if other.computed >= other.prompt_length:
                        return True, other
                    computing = True
        return computing, None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.arrival}.{self.index}, {self.state}, "
            f"{self.computed} of {len(self.tokens)} tokens computed)"
        )


@dataclass(slots=True)
class Chunk:
    """What a step feeds of one sequence: ``tokens`` at positions ``start``, ``start + 1``, ...

    ``slots`` has each position's place in the cache, -1 where the row is there already and must not
    be written. Such positions come first. Logits are wanted for the last ``logits`` positions.
    Where the chunk ``ends`` the sequence a token is to be chosen; the last ``drafts`` fed are
    drafts, and the logits of the ``1 + drafts`` last positions judge them.
    """

    sequence: Sequence
    start: int
    tokens: list[int]
    slots: list[int]
    logits: int
    ends: bool
    drafts: int = 0

    @property
    def table(self) -> PageTable:
        """The sequence's pages, with room for every position fed."""
        return self.sequence.table

    def expect(self, new: list[int], finished: bool) -> None:
        """Raise ValueError for chosen tokens that can't follow from the chunk."""
        sequence = self.sequence
        if not self.ends:
            if new:
                raise ValueError(f"{sequence} gets a token before its prompt is computed")
            return
        if not new and not finished:
            raise ValueError(f"{sequence} gets no token and isn't finished")
        length, most = len(sequence.tokens) + len(new), sequence.max_length
        if length > most or (length == most and not finished):
            raise ValueError(
                f"{sequence} was added for {most} tokens and isn't finished at {length}"
            )
        # The rows of other tokens would be those of the drafts.
        first = len(self.tokens) - self.drafts
        if len(new) > 1 and new[:-1] != self.tokens[first : first + len(new) - 1]:
            raise ValueError(f"{sequence}: the tokens chosen, but the last, must be drafts")


@dataclass(slots=True)
class Step:
    """What to compute next: first the page ``copies`` (source, target), then all ``chunks``.

    ``preempted`` lost their rows and wait again; ``expired`` are over their deadline and have
    ended.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)

    def __len__(self) -> int:
        """Return how many tokens are fed."""
        return sum(len(chunk.tokens) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Stats:
    """The scheduler at a moment; the last five are counted from its start.

    ``prefix_queries`` and ``prefix_hits`` are prompt tokens looked up and found, once a request.
    """

    running: int
    waiting: int
    waiting_tokens: int
    pages: int
    used: int
    cached: int
    prefix_queries: int
    prefix_hits: int
    forks: int
    preemptions: int
    expired: int
