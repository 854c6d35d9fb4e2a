"""One answer in the making: its choice of tokens, its text, its grammar, its end."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ziphius.config.errors import in_one_line
from ziphius.inference.errors import RequestError
from ziphius.inference.grammar import Matcher
from ziphius.inference.logits import Row
from ziphius.inference.logprobs import Scored
from ziphius.inference.noise import Noise
from ziphius.inference.outputs import CompletionOutput, Delta
from ziphius.inference.params import SamplingParams
from ziphius.inference.sampler import Sampled, Sampler
from ziphius.inference.stop import AnswerText, Finish
from ziphius.inference.verification import Coupled, Verifier
from ziphius.inference.vocabulary import Vocabulary
from ziphius.kernels.draw import Draw


class Answer:
    """The ``index``-th of a request's answers.

    ``take`` is given the logits of the positions behind the answer so far, one more than there are
    drafts, and chooses tokens as long as the drafts stand (report section 2.2 speculates; how to
    verify is left open there).
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        index: int,
        seed: int,
        end_ids: frozenset[int],
        vocabulary: Vocabulary | None,
        matcher: Matcher | None,
        verifier: type[Verifier] = Coupled,
        draw: Draw | None = None,
    ) -> None:
        self.index, self.params = index, params
        noise = Noise(seed, index)
        self.sampler = Sampler(
            params, prompt, noise, stop_ids=end_ids, vocabulary=vocabulary, draw=draw
        )
        self.verifier = verifier(self.sampler)
        self.text = AnswerText(vocabulary, params, end_ids)
        self.matcher = matcher
        self.output: list[int] = []
        self.shown: list[str] = []
        self.logprobs: list[Scored] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.experts: Tensor | None = None
        self.delta = Delta(index)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def plain(self) -> bool:
        """Whether the next choices are a kernel's alone, and need nothing of this answer."""
        verifier, length = self.verifier, len(self.output)
        return self.matcher is None and isinstance(verifier, Coupled) and self.sampler.plain(length)

    def take(
        self, logits: Sequence[Row], drafts: Sequence[int], ready: Sequence[Sampled | None] = ()
    ) -> list[int]:
        """Choose the next tokens; return them, accepted drafts and then one more, or fewer at the
        end of the answer. An error ends it, and nothing else.

        ``ready`` are choices that a kernel has made already, where it could.
        """
        new: list[int] = []
        ready = ready or [None] * len(logits)
        try:
            for row_V, draft, made in zip(logits, [*drafts, None], ready, strict=True):
                token = self._choose(row_V, draft, made)
                new.append(token)
                if self.finished or token != draft:
                    break
        except RequestError as error:
            self.fail(str(error))
        except Exception as error:  # a mistake of ours must not end other people's requests
            self.fail(f"{type(error).__name__}: {in_one_line(error)}")
        return new

    def _choose(self, row_V: Row, draft: int | None, made: Sampled | None) -> int:
        mask = self.matcher.mask() if self.matcher is not None else None
        sampled = made or self.verifier.choose(row_V, self.output, mask, draft)
        token = sampled.token
        self.output.append(token)
        self.delta.token_ids.append(token)
        if sampled.logprob is not None and sampled.rank is not None:
            scored = Scored(token, sampled.logprob, sampled.rank, sampled.top)
            self.logprobs.append(scored)
            self.delta.logprobs.append(scored)
        self._show(self.text.push(token))
        self.delta.offsets.append(self.text.offsets[-1])
        if self.text.finish is None and self.matcher is not None:
            self.matcher.advance(token)
            if self.matcher.must_end:
                self._show(self.text.end(Finish("stop")))
        self._note(self.text.finish)
        return token

    def guess(self, row_V: Row, drafts: Sequence[int]) -> int:
        """Guess the token behind the answer and ``drafts`` from a draft's logits.

        Raises RequestError where none can follow.
        """
        mask = self.matcher.masks(drafts)[-1] if self.matcher is not None else None
        return self.verifier.guess(row_V, [*self.output, *drafts], mask)

    def stop_at_length(self) -> None:
        """End where the context is full."""
        if not self.finished:
            self._show(self.text.end(Finish("length")))
            self._note(self.text.finish)

    def fail(self, reason: str) -> None:
        """End with an error in one line."""
        if not self.finished:
            self.finish_reason = self.delta.finish_reason = "error"
            self.error = self.delta.error = reason

    def abort(self) -> None:
        """End because nobody wants it any more."""
        if not self.finished:
            self.finish_reason = self.delta.finish_reason = "abort"

    def pull(self) -> Delta:
        """Return what was added since the last call."""
        delta, self.delta = self.delta, Delta(self.index)
        return delta

    def result(self) -> CompletionOutput:
        """Return the answer so far."""
        asked = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self.shown),
            token_ids=tuple(self.output),
            offsets=tuple(self.text.offsets),
            logprobs=tuple(self.logprobs) if asked else None,
            cumulative_logprob=sum(s.logprob for s in self.logprobs) if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
            experts=self.experts,
        )

    def _show(self, text: str) -> None:
        if text:
            self.shown.append(text)
            self.delta.text += text

    def _note(self, finish: Finish | None) -> None:
        if finish is not None and not self.finished:
            self.finish_reason = self.delta.finish_reason = finish.reason
            self.stop_reason = self.delta.stop_reason = finish.matched
