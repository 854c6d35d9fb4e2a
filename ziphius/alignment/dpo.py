"""Direct preference optimisation: its loss, the objective of a step, and the stage (facts 8.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ziphius.alignment.documents import DocumentSums
from ziphius.alignment.heldout import HeldOut
from ziphius.alignment.holdout import divided
from ziphius.alignment.lines import sources_of
from ziphius.alignment.packing import PackedUnits, as_rows
from ziphius.alignment.pairs import (
    both,
    bradley_terry,
    count_pairs,
    mean_of_pairs,
    told_of_pairs,
    wins,
)
from ziphius.alignment.preferences import pairs_of, read_preferences
from ziphius.alignment.records import Sample
from ziphius.alignment.reference import REFERENCE, KeptNear, NearReference
from ziphius.config.dpo import DpoConfig
from ziphius.config.recipe import Recipe
from ziphius.data.rows import Batch, row_targets
from ziphius.inference.chat import TEMPLATE_FILE, ChatTemplate
from ziphius.inference.template import chat_template_of
from ziphius.kernels.loss import IGNORED
from ziphius.model.transformer import Features, Transformer
from ziphius.parallel.passes import Passes
from ziphius.training.objective import Losses, LossParts
from ziphius.training.saving import Saver
from ziphius.training.schedule import StepSettings
from ziphius.training.stage import Stage
from ziphius.training.start import Start
from ziphius.training.watch import Watch


class PreferenceLoss(NamedTuple):
    """Terms of every pair: what is minimised, and the implicit rewards of the two answers."""

    loss: Tensor
    chosen: Tensor
    rejected: Tensor


def preference_loss(chosen: Tensor, rejected: Tensor, beta: float) -> PreferenceLoss:
    """Compute the loss of pairs of whole answers from ``log pi - log pi_ref`` of each.

    Implicit rewards are beta times these (facts 8.4).
    """
    rewards = beta * chosen, beta * rejected
    return PreferenceLoss(bradley_terry(*rewards), *rewards)


@dataclass(frozen=True)
class Dpo(NearReference):
    """The objective of one step, a mean over the ``pairs`` of its global batch.

    Rows hold pairs of documents. ``accuracy`` is the share of pairs whose chosen answer has the
    higher implicit reward, where equal ones count half; ``margin`` is the difference of the two.
    ``likelier`` is the share of pairs whose chosen answer is the likelier one by itself.
    """

    config: DpoConfig
    pairs: int
    size = 9
    extra = ("accuracy", "margin", "reward_chosen", "reward_rejected", "likelier")

    def __call__(self, model: Transformer, features: Features, rows: Batch) -> LossParts:
        """Compute what a part of the network gives of some rows."""
        zero = torch.zeros((), dtype=model.precision.high, device=rows.tokens_BS.device)
        if not model.part.ends:
            return LossParts(zero, Losses(zero, zero, zero, zero), zero.expand(5))
        targets_BT = row_targets(rows, 0, document_mask=True)
        judged = model.positions.log_probs(model, features.hidden_BTD, targets_BT, 0)
        learned_Bj = judged.pick(targets_BT) != IGNORED
        reference_Bj = judged.pick(rows.fields[REFERENCE][:, 1:])
        sums = DocumentSums.of_judged(model, judged, rows)
        # Differences of tokens are small numbers, where sums over answers are large ones.
        log_ratio_Bj = (judged.log_probs_Bj - reference_Bj).masked_fill(~learned_Bj, 0)
        terms = preference_loss(*both(sums(log_ratio_Bj)), self.config.beta)
        loss = mean_of_pairs(terms.loss, rows, self.pairs)

        # Every process that shares the rows knows all pairs; each counts its tokens' share.
        own_Bp, _ = both(sums.share_here(learned_Bj.to(zero.dtype)))
        log_probs_Bj = judged.log_probs_Bj.detach().masked_fill(~learned_Bj, 0)
        numbers = [terms.loss, *told_of_pairs(terms.chosen, terms.rejected)]
        numbers.append(wins(*both(sums(log_probs_Bj))))
        main, *others = (mean_of_pairs(x.detach() * own_Bp, rows, self.pairs) for x in numbers)
        return LossParts(loss, Losses(main, zero, zero, main), torch.stack(others))


class PreferenceTraining(KeptNear):
    """What a stage of DPO holds besides the policy: the reference, frozen where it begins."""

    def __init__(self, config: DpoConfig) -> None:
        self.config = config
        self.dtype = torch.float32

    def lay(self, rows: Sequence[Sequence[Sample]], length: int) -> Batch:
        """Lay pairs out, with room for what the reference says of every token."""
        batch = as_rows(rows, length)
        room_BS = torch.zeros(batch.tokens_BS.shape, dtype=self.dtype)
        return Batch(batch.tokens_BS, batch.documents_BS, {**batch.fields, REFERENCE: room_BS})

    def begin(self, passes: Passes, saver: Saver) -> Mapping[str, Mapping[str, Tensor]]:
        """Make room for the reference; return what checkpoints are to keep."""
        self.dtype = passes.models[0].precision.high
        return super().begin(passes, saver)

    def aim(self, batch: Batch, settings: StepSettings | None = None) -> Dpo:
        """Return what a step minimises."""
        return Dpo(self.config, count_pairs(batch), reference=self.reference)


def preferring(recipe: Recipe, start: Start, watch: Watch) -> Stage:
    """Return the stage that learns a recipe's pairs, from a checkpoint on: its table [dpo].

    Raises BadInput for records that cannot be used.
    """
    config = recipe.dpo or DpoConfig()
    preferences, digest = read_preferences(sources_of(config.source, "dpo"))
    template, longest = ChatTemplate(format=config.format), config.sequence_length + 1
    kept, held = divided(
        preferences, lambda pair: pair.prompt, recipe.run.seed, config.holdout_every
    )
    pairs, dropped = pairs_of(kept, template, start.tokenizer, longest)
    heldout, _ = pairs_of(held, template, start.tokenizer, longest)
    work = PreferenceTraining(config)
    length = config.sequence_length
    batches = PackedUnits(pairs, sequence_length=length, seed=recipe.run.seed, lay=work.lay)
    config = config.lasting(batches.rows_per_epoch)
    watch.say(
        f"{len(preferences):,} pairs, {len(pairs):,} to learn in {batches.rows_per_epoch:,} rows, "
        f"{len(heldout):,} held out; left out: {dropped.empty} with an empty answer, "
        f"{dropped.same} of equal answers, {dropped.too_long} longer than a row"
    )
    return Stage(
        table="dpo",
        spells=False,
        config=config,
        tokenizer=start.tokenizer,
        batches=batches,
        aim=work.aim,
        identity=digest,
        document_mask=True,
        start=start.folder,
        files={TEMPLATE_FILE: chat_template_of(config.format)},
        about={
            **start.about,
            "records": len(preferences),
            "records_sha256": digest,
            "pairs": len(pairs),
            "heldout_pairs": len(heldout),
            "padding": batches.padding,
            "dropped": dropped.describe(),
        },
        begin=work.begin,
        ready=work.ready,
        measure=HeldOut(heldout, work.lay, work.aim, sequence_length=length),
    )
