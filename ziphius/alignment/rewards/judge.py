"""A model as judge, over any OpenAI-compatible endpoint: it votes, and the majority decides.

V3's own judgements serve as rewards this way (facts 8.2), steered by a constitution.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from types import TracebackType
from typing import TypeVar

from ziphius.alignment.endpoint import Client, Endpoint, short
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.rewards.verdicts import (
    Choice,
    Message,
    Verdict,
    grade_messages,
    majority,
    pair_messages,
    read_choice,
    read_grade,
    swapped,
)
from ziphius.config.errors import BadInput, ZiphiusError

T = TypeVar("T")


class Judge:
    """Votes of one model. Any thread may ask; all of them share the endpoint's concurrency.

    A vote that gets no answer in time, an error, or words that hold no verdict abstains;
    ``abstained`` counts them, ``last_problem`` says why the last one did.
    """

    def __init__(
        self, endpoint: Endpoint, *, votes: int = 1, seed: int = 0, constitution: str = ""
    ) -> None:
        """Make a judge that asks ``votes`` times; ``seed`` decides which answer is shown first."""
        if votes < 1:
            raise BadInput(f"judge {endpoint.model}: {votes} votes: use at least 1")
        self.abstained, self.last_problem = 0, ""
        self._client, self._votes, self._seed = Client(endpoint), votes, seed
        self._constitution = constitution

    def choose(self, question: str, first: str, second: str) -> Choice:
        """Return which of two answers is better, by the majority of the votes that were cast."""
        swaps = [swapped(self._seed, n, question, first, second) for n in range(self._votes)]
        pairs = [(second, first) if swap else (first, second) for swap in swaps]

        def read(text: str, number: int) -> Verdict | None:
            return read_choice(text, swap=swaps[number])

        asked = [pair_messages(question, *pair, self._constitution) for pair in pairs]
        votes: tuple[Verdict | None, ...] = tuple(self._cast(asked, read))
        return Choice(majority(votes), votes)

    def grade(self, question: str, answer: str) -> float:
        """Return an answer's grade from 0 to 1, the mean of the votes.

        Raises ZiphiusError where all of them abstained.
        """
        asked = [grade_messages(question, answer, self._constitution)] * self._votes
        cast = self._cast(asked, lambda text, number: read_grade(text))
        grades = [grade for grade in cast if grade is not None]
        if not grades:
            raise ZiphiusError(
                f"judge {self._client.endpoint.model} gave no verdict in {self._votes} votes: "
                f"{self.last_problem}"
            )
        return fmean(grades)

    def __call__(self, response: Response) -> float:
        """Be a reward: the grade of all the text it is shown, 0 for an unfinished one.

        It raises as ``grade`` does, so among composed rewards a judge that times out counts 0.
        """
        if not response.finished:
            return 0.0
        return self.grade(response.problem.question, response.text)

    def close(self) -> None:
        """End the connections and the thread that holds them. Another question opens new ones."""
        self._client.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _cast(
        self, asked: list[list[Message]], read: Callable[[str, int], T | None]
    ) -> list[T | None]:
        """Return every vote's verdict, None where it abstains."""
        said = self._client.ask([(messages, self._seed + n) for n, messages in enumerate(asked)])
        verdicts = []
        for number, one in enumerate(said):
            found = None if one.text is None else read(one.text, number)
            if found is None:
                self.abstained += 1
                words = f"no verdict in its words: {short(one.text or '')}"
                self.last_problem = one.problem or words
            verdicts.append(found)
        return verdicts
