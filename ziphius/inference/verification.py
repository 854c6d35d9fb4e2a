"""Two ways to verify drafts: by the noise of the choice itself, or by rejection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from ziphius.config.errors import BadInput
from ziphius.inference.grammar import Mask
from ziphius.inference.logits import Row
from ziphius.inference.noise import Stream
from ziphius.inference.rejection import Shares, draw, verify
from ziphius.inference.sampler import Sampled, Sampler

Verification = Literal["coupled", "rejection"]


class Verifier(Protocol):
    """Drafts tokens of one answer, and chooses those that stand.

    ``logits`` are ``[V]``, ``allowed`` is a grammar's mask or None. The randomness is a function of
    the request's seed, the answer's index and the position.
    """

    def __init__(self, sampler: Sampler) -> None: ...

    def guess(self, logits_V: Row, ahead: Sequence[int], allowed_V: Mask | None) -> int:
        """Draft the token behind ``ahead``, the output and earlier drafts, from a draft's logits.

        Raises RequestError where no token can follow.
        """

    def choose(
        self, logits_V: Row, output: Sequence[int], allowed_V: Mask | None, draft: int | None
    ) -> Sampled:
        """Choose the token behind ``output``, where ``draft`` was drafted, if one was.

        Raises RequestError as ``Sampler.choose`` does.
        """


class Coupled:
    """A draft is what the sampler would choose by the draft's logits, with the choice's own noise.

    It is accepted when it is the choice, which does not know of it. So drafts change neither the
    tokens nor their log-probabilities, at any temperature.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def guess(self, logits_V: Row, ahead: Sequence[int], allowed_V: Mask | None) -> int:
        return self.sampler.token(logits_V, ahead, allowed_V=allowed_V)

    def choose(
        self, logits_V: Row, output: Sequence[int], allowed_V: Mask | None, draft: int | None
    ) -> Sampled:
        return self.sampler.choose(logits_V, output, allowed_V=allowed_V)


class Rejection:
    """A draft is drawn by noise of its own, and accepted with probability ``min(1, p / q)``.

    ``p`` and ``q`` are what the sampler makes of the model's and the draft's logits: temperature,
    filters, penalties and grammar included. The tokens are distributed as without drafts; which
    ones they are depends on where there were drafts. Greedy they are the same.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._drawn: dict[int, Shares] = {}  # what the newest draft of a position was drawn from

    def guess(self, logits_V: Row, ahead: Sequence[int], allowed_V: Mask | None) -> int:
        q_V = self.sampler.distribution(logits_V, ahead, allowed_V=allowed_V)
        self._drawn[len(ahead)] = q_V
        return draw(q_V, self.sampler.noise, len(ahead), Stream.DRAFT)

    def choose(
        self, logits_V: Row, output: Sequence[int], allowed_V: Mask | None, draft: int | None
    ) -> Sampled:
        if draft is None:
            self._drawn.pop(len(output), None)  # of a draft that found no place in a step
            return self.sampler.choose(logits_V, output, allowed_V=allowed_V)
        p_V = self.sampler.distribution(logits_V, output, allowed_V=allowed_V)
        q_V = self._drawn.pop(len(output))
        verified = verify(p_V, q_V, draft, self.sampler.noise, len(output))
        return self.sampler.report(logits_V, verified.token)


_WAYS: Mapping[str, type[Verifier]] = {"coupled": Coupled, "rejection": Rejection}


def verifier(name: str) -> type[Verifier]:
    """Return the way that ``name`` means. Raises BadInput for another name."""
    if name not in _WAYS:
        raise BadInput(f"verification = '{name}': use {' or '.join(_WAYS)}")
    return _WAYS[name]
