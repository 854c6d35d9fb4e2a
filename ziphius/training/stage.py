"""One stage of the recipe: the batches it learns from, and what it minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer
from torch import Tensor

from ziphius.config.pretrain import TrainingConfig
from ziphius.config.recipe import Recipe
from ziphius.data.heldout import HeldoutRows
from ziphius.data.rows import Batch
from ziphius.parallel.passes import Objective, Passes
from ziphius.parallel.rows import MicroBatch
from ziphius.training.objective import PreTraining, count_targets
from ziphius.training.saving import Saver
from ziphius.training.schedule import StepSettings
from ziphius.training.start import Start
from ziphius.training.text import Text


class Batches(Protocol):
    """An endless stream of global batches that can stop and go on; every rank has the same."""

    def next_batch(self, batch_size: int) -> Batch:
        """Return the next rows, on the CPU."""
        ...

    def state(self) -> dict[str, Any]:
        """Return, as JSON, where in the stream the next batch begins, and of what stream."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises BadInput for that of another stream."""
        ...

    @property
    def at_rest(self) -> bool:
        """Whether the stream can go on from its ``state`` of this moment."""
        ...

    @property
    def turn(self) -> int:
        """Which text the next batch is of: losses of one say nothing of another's."""
        ...

    def forget(self) -> None:
        """Leave out what was made for weights that are gone: the run has gone back."""
        ...

    def close(self) -> None:
        """End what works ahead."""
        ...


class StepObjective(Objective, Protocol):
    """What one step minimises. Its numbers are those of ``Losses``, then its ``extra`` ones."""

    @property
    def extra(self) -> tuple[str, ...]:
        """What the numbers behind the four losses are called in metrics."""
        ...

    def prepare(self, passes: Passes, parts: list[MicroBatch]) -> None:
        """Do what comes before the step's passes; all ranks do this together."""
        ...


# What checkpoints keep beside weights and moments: kind, Hugging Face name, what this rank holds.
Kept = Mapping[str, Mapping[str, Tensor]]
# Makes what the step of a global batch minimises.
Aim = Callable[[Batch, StepSettings], StepObjective]


@dataclass(frozen=True)
class Stage:
    """A stage as the loop runs it.

    ``table`` is the recipe's that ``config`` was read from. ``identity`` says which data these are,
    ``about`` is what a summary tells of them. A stage that has ``start`` begins with the weights of
    that checkpoint. ``begin`` is told what is trained and what saves it, and returns what
    checkpoints are to keep beside it, tensors by Hugging Face names; ``ready`` is told when all
    have their values, and whether the run goes on. ``notes`` are what metrics tell of a batch.
    ``measure`` is what else than bits per byte is measured of what was held out, by names that
    begin with ``heldout_``; all ranks do it together. Weights that are ``fresh`` begin anew,
    whatever the checkpoint has. Where the loss is of no text (not ``spells``), nothing is told in
    bits per byte. Between ``steps_together`` steps nothing can be saved. ``record`` writes a
    shorter length into a recipe whose table is not ``config`` itself. ``files`` are texts that the
    final checkpoint has besides, by their names.
    """

    table: str
    config: TrainingConfig
    tokenizer: Tokenizer
    batches: Batches
    aim: Aim
    identity: str
    document_mask: bool = False
    heldout: HeldoutRows | None = None
    start: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    begin: Callable[[Passes, Saver], Kept] = lambda passes, saver: {}
    ready: Callable[[bool], None] = lambda resumed: None
    notes: Callable[[], Mapping[str, Any]] = dict
    measure: Callable[[Passes], Mapping[str, float]] = lambda passes: {}
    fresh: frozenset[str] = frozenset()
    spells: bool = True
    steps_together: int = 1
    record: Callable[[Recipe, TrainingConfig], Recipe] | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def save_every(self, steps: int) -> int:
        """Return after how many steps a run saves that is told to do so every ``steps``."""
        return -(-steps // self.steps_together) * self.steps_together

    def recorded(self, recipe: Recipe, made: TrainingConfig) -> Recipe:
        """Return the recipe of a run that ended early: ``made`` says what it has become."""
        if self.record is not None:
            return self.record(recipe, made)
        return recipe.model_copy(update={self.table: made})


@dataclass(frozen=True)
class NextTokens:
    """An ``Aim``: next tokens, at every depth that the network predicts."""

    config: TrainingConfig
    document_mask: bool = False

    def __call__(self, batch: Batch, settings: StepSettings) -> PreTraining:
        """Return what a step of ``batch`` minimises."""
        return PreTraining(
            self.config,
            mtp_loss_weight=settings.mtp_loss_weight,
            target_count=max(1, count_targets(batch, document_mask=self.document_mask)),
            sequence_count=len(batch),
            document_mask=self.document_mask,
        )


def pretraining(recipe: Recipe, text: Text, start: Start | None = None) -> Stage:
    """Return the stage that learns a text, from a checkpoint on if one is given."""
    mask = recipe.data.document_mask
    return Stage(
        table="pretrain",
        config=recipe.pretrain,
        tokenizer=text.tokenizer,
        batches=text.loader,
        aim=NextTokens(recipe.pretrain, mask),
        identity=text.corpus.sha256,
        document_mask=mask,
        heldout=text.heldout,
        start=None if start is None else start.folder,
        about={**text.describe(), **({} if start is None else start.about)},
    )
