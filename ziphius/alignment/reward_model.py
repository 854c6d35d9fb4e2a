"""Models that score answers: their losses, the objective of a step, and the stage (facts 8.2).

A score is read from a second head at the last token of an answer, or of the reasoning about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.alignment.documents import DocumentSums
from ziphius.alignment.heldout import HeldOut
from ziphius.alignment.holdout import divided
from ziphius.alignment.lines import sources_of
from ziphius.alignment.packing import PackedUnits
from ziphius.alignment.pairs import (
    both,
    bradley_terry,
    count_pairs,
    mean_of_pairs,
    told_of_pairs,
)
from ziphius.alignment.scored import READ, WORTH, lay_scored, read_judged, units_of
from ziphius.config.recipe import Recipe
from ziphius.config.reward import RewardConfig
from ziphius.data.rows import Batch, row_targets
from ziphius.model.transformer import Features, Transformer
from ziphius.parallel.passes import Passes
from ziphius.parallel.rows import MicroBatch
from ziphius.training.objective import Losses, LossParts, count_targets
from ziphius.training.schedule import StepSettings
from ziphius.training.stage import Stage
from ziphius.training.start import Start
from ziphius.training.watch import Watch

HEAD = "score.weight"


def safety_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how surprising labels are, 1 for good or safe: ``-log sigmoid(s)`` of those.

    Of label 0 it is ``-log sigmoid(-s)``. So a score above 0 says good.
    """
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")


def regression_loss(scores: Tensor, worth: Tensor) -> Tensor:
    """Return squared errors."""
    return (scores - worth).square()


@dataclass(frozen=True)
class Scoring:
    """The objective of one step, a mean over the ``units`` of its global batch: pairs, or answers.

    The cross entropy of ``tokens`` tokens of reasoning comes to it, with its weight. ``accuracy``
    is the share of pairs in the right order, or of labels that the sign of the score tells;
    ``error`` is the mean distance of a score to what it should be.
    """

    config: RewardConfig
    units: int
    tokens: int

    @property
    def extra(self) -> tuple[str, ...]:
        """What the numbers behind the four losses are called in metrics."""
        of_kind = {
            "pairwise": ("accuracy", "margin", "score_chosen", "score_rejected"),
            "binary": ("accuracy", "score"),
            "regression": ("error", "score"),
        }
        return (*of_kind[self.config.kind], "reasoning_loss")

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return 4 + len(self.extra)

    def prepare(self, passes: Passes, parts: list[MicroBatch]) -> None:
        """Nothing comes before the passes."""

    def __call__(self, model: Transformer, features: Features, rows: Batch) -> LossParts:
        """Compute what a part of the network gives of some rows."""
        zero = torch.zeros((), dtype=model.precision.high, device=rows.tokens_BS.device)
        if not model.part.ends:
            nothing = zero.expand(len(self.extra))
            return LossParts(zero, Losses(zero, zero, zero, zero), nothing)
        # A process has the scores of its own positions.
        scores_Bt = model.scores(features.hidden_BTD)[..., 0]
        of_kind = self._pairs if self.config.kind == "pairwise" else self._answers
        loss, numbers = of_kind(model, scores_Bt, rows)
        reasoning = zero
        if self.tokens and self.config.reasoning_weight:
            targets_BT = row_targets(rows, 0, document_mask=True)
            nats = model.positions.cross_entropy(model, features.hidden_BTD, targets_BT, 0)
            reasoning = nats / self.tokens
        weighted = self.config.reasoning_weight * reasoning
        main, others = numbers[0], [*numbers[1:], reasoning.detach()]
        losses = Losses(main, zero, zero, main + weighted.detach())
        return LossParts(loss + weighted, losses, torch.stack(others))

    def _pairs(
        self, model: Transformer, scores_Bt: Tensor, rows: Batch
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of pairs, and the loss and other numbers that this process counts."""
        read_Bt = model.positions.own(rows.fields[READ][:, :-1], 0)
        sums = DocumentSums.of_inputs(model, rows)
        chosen_Bp, rejected_Bp = both(sums(scores_Bt.masked_fill(~read_Bt, 0)))
        loss_Bp = bradley_terry(chosen_Bp, rejected_Bp)
        own_Bp, _ = both(sums.share_here(read_Bt.to(scores_Bt.dtype)))
        numbers = [loss_Bp, *told_of_pairs(chosen_Bp, rejected_Bp)]
        counted = [mean_of_pairs(x.detach() * own_Bp, rows, self.units) for x in numbers]
        return mean_of_pairs(loss_Bp, rows, self.units), counted

    def _answers(
        self, model: Transformer, scores_Bt: Tensor, rows: Batch
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of answers whose scores are read here, and the numbers of them."""
        read_Bt, worth_Bt = (
            model.positions.own(rows.fields[name][:, :-1], 0) for name in (READ, WORTH)
        )
        worth_Bt = worth_Bt.to(scores_Bt.dtype)
        if self.config.kind == "binary":
            losses_Bt = safety_loss(scores_Bt, worth_Bt)
            judged_Bt = ((scores_Bt > 0) == (worth_Bt > 0)).to(scores_Bt.dtype)
        else:
            losses_Bt = regression_loss(scores_Bt, worth_Bt)
            judged_Bt = (scores_Bt - worth_Bt).abs()

        def mean(values_Bt: Tensor) -> Tensor:
            return values_Bt.masked_fill(~read_Bt, 0).sum() / max(1, self.units)

        loss = mean(losses_Bt)
        return loss, [loss.detach(), mean(judged_Bt.detach()), mean(scores_Bt.detach())]


def aim(config: RewardConfig, batch: Batch, settings: StepSettings | None = None) -> Scoring:
    """Return what a step minimises of its batch."""
    pairwise = config.kind == "pairwise"
    units = count_pairs(batch) if pairwise else int(batch.fields[READ].sum())
    return Scoring(config, units, count_targets(batch, document_mask=True))


def scoring(recipe: Recipe, start: Start, watch: Watch) -> Stage:
    """Return the stage that makes a model that scores answers: the recipe's table [reward].

    The recipe's network has one label. Raises BadInput for records that cannot be used.
    """
    config = recipe.reward or RewardConfig()
    judged, digest = read_judged(sources_of(config.source, "reward"), config.kind)
    kept, held = divided(judged, lambda one: one.prompt, recipe.run.seed, config.holdout_every)
    units, dropped = units_of(kept, config, start.tokenizer)
    heldout, _ = units_of(held, config, start.tokenizer)
    length = config.sequence_length
    # The last token of a row is no input, and has no score.
    batches = PackedUnits(
        units, sequence_length=length, seed=recipe.run.seed, spare=1, lay=lay_scored
    )
    config = config.lasting(batches.rows_per_epoch)
    reasons = bool(judged) and judged[0].reasoning[0] is not None
    left_out = ", ".join(f"{number} {why}" for why, number in dropped.describe().items())
    watch.say(
        f"{len(judged):,} records, {len(units):,} to learn in {batches.rows_per_epoch:,} rows, "
        f"{len(heldout):,} held out; with{'' if reasons else 'out'} reasoning; left out: {left_out}"
    )
    return Stage(
        table="reward",
        spells=False,
        config=config,
        tokenizer=start.tokenizer,
        batches=batches,
        aim=lambda batch, settings: aim(config, batch, settings),
        identity=digest,
        document_mask=True,
        start=start.folder,
        about={
            **start.about,
            "kind": config.kind,
            "reasoning": reasons,
            "records": len(judged),
            "records_sha256": digest,
            "units": len(units),
            "heldout_units": len(heldout),
            "padding": batches.padding,
            "dropped": dropped.describe(),
        },
        measure=HeldOut(
            heldout,
            lay_scored,
            lambda batch: aim(config, batch),
            sequence_length=length,
            spare=1,
        ),
        fresh=frozenset() if start.config.num_labels == 1 else frozenset({HEAD}),
    )
