"""The policy that answers are kept near to: weights that take the place of others for a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ziphius.data.rows import Batch, row_targets
from ziphius.model.transformer import Features, Transformer
from ziphius.parallel.passes import Passes
from ziphius.parallel.rows import MicroBatch
from ziphius.parallel.spread import held_weights
from ziphius.training.saving import Saver

# What a learned token's log-probability is under the reference, by name in ``Batch.fields``.
REFERENCE = "reference"


class Reference:
    """What this rank holds of the reference, by Hugging Face name, where its own weights lie."""

    def __init__(self, models: Sequence[Transformer]) -> None:
        self.models = models
        self.weights: dict[str, Tensor] = {}
        for name, weight in self._held():
            self.weights.setdefault(name, torch.empty_like(weight))

    def take(self) -> None:
        """Become what the policy is now."""
        with torch.no_grad():
            for name, weight in self._held():
                self.weights[name].copy_(weight)

    def measure(self, passes: Passes, parts: Sequence[MicroBatch]) -> None:
        """Fill the fields ``REFERENCE`` of micro-batches; all ranks do this together."""
        with self._in_place():
            passes.measure(parts, _Collect())

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        own = [(weight, weight.clone(), self.weights[name]) for name, weight in self._held()]
        try:
            with torch.no_grad():
                for weight, _, reference in own:
                    weight.copy_(reference)
            yield
        finally:
            with torch.no_grad():
                for weight, before, _ in own:
                    weight.copy_(before)

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        for model in self.models:
            yield from held_weights(model)


class KeptNear:
    """A stage whose policy is kept near to a reference: what it began with, until renewed."""

    reference: Reference | None = None

    def begin(self, passes: Passes, saver: Saver) -> Mapping[str, Mapping[str, Tensor]]:
        """Make room for the reference; return what checkpoints are to keep."""
        self.reference = Reference(passes.models)
        return {REFERENCE: self.reference.weights}

    def ready(self, resumed: bool) -> None:
        """Take the policy that the stage begins with for the reference."""
        if self.reference is not None and not resumed:
            self.reference.take()


@dataclass(frozen=True)
class NearReference:
    """Of a step's objective: it asks the reference before the passes, where there is one."""

    reference: Reference | None = field(default=None, kw_only=True)

    def prepare(self, passes: Passes, parts: list[MicroBatch]) -> None:
        """Find the reference's log-probabilities."""
        if self.reference is not None:
            self.reference.measure(passes, parts)


@dataclass(frozen=True)
class _Nothing:
    total: Tensor

    def numbers(self) -> Tensor:
        return self.total[None]


class _Collect:
    """Writes log-probabilities of a row's tokens where the loss will look for them."""

    size = 1

    def __call__(self, model: Transformer, features: Features, rows: Batch) -> _Nothing:
        if model.part.ends:
            targets_BT = row_targets(rows, 0, document_mask=True)
            judged = model.positions.log_probs(model, features.hidden_BTD, targets_BT, 0)
            reference_BT = rows.fields[REFERENCE][:, 1:]
            where = slice(None) if judged.where is None else judged.where
            reference_BT[:, where] = judged.log_probs_Bj.to(reference_BT.dtype)
        return _Nothing(torch.zeros((), device=rows.tokens_BS.device))
