"""A request as the engine keeps it: its answers, and the log-probabilities of its prompt."""

from __future__ import annotations

from collections.abc import Sequence as List

import numpy as np

from ziphius.inference.answer import Answer
from ziphius.inference.errors import RequestError
from ziphius.inference.logits import Row
from ziphius.inference.logprobs import Scored, score
from ziphius.inference.outputs import RequestOutput
from ziphius.inference.params import SamplingParams
from ziphius.inference.sequence import Chunk, Sequence
from ziphius.kernels.draw import Draw


class Request:
    """One prompt and its ``n`` answers, each a sequence of the scheduler."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_ids: List[int],
        params: SamplingParams,
        answers: List[Answer],
    ) -> None:
        self.request_id, self.prompt, self.params = request_id, prompt, params
        self.prompt_ids = tuple(prompt_ids)
        self.answers = list(answers)
        self.sequences: list[Sequence] = []
        self.prompt_logprobs: list[Scored | None] = [None]
        self.drafted = self.accepted = 0

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(answer.finished for answer in self.answers)

    def score_prompt(self, chunk: Chunk, rows: List[Row], draw: Draw | None) -> None:
        """Note the log-probabilities of the prompt tokens that follow a chunk's last positions.

        ``rows`` are the chunk's wanted logits, in order; ``draw`` sums them. What is known already
        stays. Raises RequestError for a row with NaN or infinity.
        """
        count = self.params.prompt_logprobs
        if count is None or chunk.sequence.index:
            return
        first = chunk.start + len(chunk.tokens) - len(rows)
        for position, row_V in enumerate(rows, first):
            if position + 1 == len(self.prompt_logprobs) < len(self.prompt_ids):
                if not np.isfinite(row_V.max()):  # NaN counts as the largest
                    raise RequestError(
                        f"the model's logits at prompt position {position} hold NaN or infinity: "
                        "the next token has no log-probability"
                    )
                token = self.prompt_ids[position + 1]
                self.prompt_logprobs.append(score(row_V, token, count, draw))

    def result(self) -> RequestOutput:
        """Return everything so far."""
        asked = self.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=tuple(answer.result() for answer in self.answers),
            finished=self.finished,
            prompt_logprobs=tuple(self.prompt_logprobs) if asked else None,
            num_cached_tokens=max([0, *(s.cached for s in self.sequences if s.index == 0)]),
            drafted=self.drafted,
            accepted=self.accepted,
        )
