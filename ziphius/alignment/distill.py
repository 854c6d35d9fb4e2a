"""Distillation: a student learns a teacher's answers, and what it thinks of their every token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ziphius.alignment.records import read_records
from ziphius.alignment.sft import stage_of
from ziphius.checkpoint.folder import TOKENIZER_FILE, checkpoint_folder
from ziphius.checkpoint.huggingface import load
from ziphius.config.distill import DistillConfig
from ziphius.config.errors import BadInput
from ziphius.config.recipe import Recipe
from ziphius.data.rows import Batch, row_targets
from ziphius.data.tokenizer import read_tokenizer
from ziphius.kernels.loss import IGNORED, linear_cross_entropy
from ziphius.model.transformer import Features, Transformer
from ziphius.parallel.passes import Passes
from ziphius.parallel.rows import MicroBatch
from ziphius.training.objective import Losses, PreTraining
from ziphius.training.schedule import StepSettings
from ziphius.training.stage import NextTokens, Stage
from ziphius.training.start import Start, checkpoint_sha256
from ziphius.training.watch import Watch


@dataclass(frozen=True)
class DivergenceOfRows:
    """A judge of ``linear_cross_entropy``: the rows of targets are a teacher's hidden states.

    It sums ``T^2 KL(teacher || student)`` of both softened by the temperature ``T``, in nats, and
    leaves the gradient in the logits' place.
    """

    head_VD: Tensor
    temperature: float = 1.0

    def __call__(self, logits_nV: Tensor, hidden_nD: Tensor) -> Tensor:
        """Judge rows of the student's logits."""
        high = torch.promote_types(logits_nV.dtype, torch.float32)
        theirs_nV = (hidden_nD @ self.head_VD.T).to(high) / self.temperature
        theirs_nV = theirs_nV.log_softmax(-1)
        ours_nV = (logits_nV.to(high) / self.temperature).log_softmax(-1)
        p_nV = theirs_nV.exp()
        loss = (p_nV * (theirs_nV - ours_nV)).sum() * self.temperature**2
        logits_nV.copy_((ours_nV.exp() - p_nV) * self.temperature)
        return loss


@dataclass(frozen=True)
class DistilledParts:
    """A micro-batch's losses, and the divergence among them, in nats a learned token."""

    losses: Losses
    divergence: Tensor
    total: Tensor

    def numbers(self) -> Tensor:
        """Return the losses and the divergence."""
        losses = self.losses
        four = torch.stack((losses.main, losses.mtp, losses.balance, self.total))
        return torch.cat((four.double(), self.divergence.double()[None]))


@dataclass(frozen=True)
class Distillation:
    """``(1 - w) CE + w KL``, and the other losses of pre-training, of one global batch."""

    plain: PreTraining
    teacher: Transformer
    config: DistillConfig
    size = 5
    extra = ("divergence",)

    def prepare(self, passes: Passes, parts: list[MicroBatch]) -> None:
        """Nothing comes before the passes."""

    def __call__(self, model: Transformer, features: Features, rows: Batch) -> DistilledParts:
        """Compute what a part of the network gives of some rows."""
        losses, weight = self.plain(model, features, rows), self.config.kl_weight
        if not model.part.ends:
            return DistilledParts(losses, torch.zeros_like(losses.main), losses.total)
        targets_BT = model.positions.own(row_targets(rows, 0, document_mask=True), 0)
        learned_Bt = targets_BT != IGNORED
        sums = linear_cross_entropy(
            features.hidden_BTD[learned_Bt],
            model.lm_head.weight,
            self._teachers(model, rows)[learned_Bt],
            rows_loss=DivergenceOfRows(self.teacher.lm_head.weight, self.config.kl_temperature),
            widened=model.kernels.product_dtype(features.hidden_BTD.dtype)
            != features.hidden_BTD.dtype,
        )
        divergence = sums / self.plain.target_count
        total = losses.total + weight * (divergence - losses.main)
        return DistilledParts(losses, divergence.detach(), total)

    @torch.no_grad()
    def _teachers(self, model: Transformer, rows: Batch) -> Tensor:
        """Return the teacher's hidden states of this process's positions."""
        hidden_BTD, _ = self.teacher.trunk(
            rows.tokens_BS[:, :-1], documents_BT=rows.documents_BS[:, :-1]
        )
        return model.positions.own(hidden_BTD, 0)


def distilling(recipe: Recipe, start: Start, watch: Watch, teacher: Path | None) -> Stage:
    """Return the stage of a recipe's table [distill]: records, and perhaps a teacher's thoughts.

    Raises BadInput for records and teachers that cannot be used.
    """
    config = recipe.distill or DistillConfig()
    if not config.source:
        raise BadInput(
            "distill.source: no records: make some by 'ziphius reject', and give the file by "
            "--set distill.source=FILE"
        )
    records, digest = read_records([Path(name.strip()) for name in config.source.split(",")])
    if teacher is not None and not config.kl_weight:
        raise BadInput(
            "--teacher: nothing is learned of it: say how much, by --set distill.kl_weight=0.5"
        )
    if teacher is None and config.kl_weight:
        raise BadInput("distill.kl_weight: say whose thoughts are learned, by --teacher CHECKPOINT")
    stage = stage_of(records, digest, recipe, config, start, watch, table="distill")
    if teacher is None:
        return stage
    return _with_teacher(stage, recipe, config, teacher)


def _require_same_tokens(teacher: Path, tokenizer: Tokenizer) -> None:
    path = checkpoint_folder(teacher) / TOKENIZER_FILE
    if path.is_file() and read_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise BadInput(f"{teacher}: its tokens are not the student's: its thoughts are of others")


def _with_teacher(stage: Stage, recipe: Recipe, config: DistillConfig, teacher: Path) -> Stage:
    if recipe.parallel.tp > 1:
        raise BadInput(
            "distill.kl_weight and parallel.tp > 1: the vocabulary is cut, and thoughts are of all "
            "of it: use tp = 1"
        )
    model = load(teacher, mtp=False).eval().requires_grad_(False).to(recipe.run.device)
    if model.config.vocab_size != recipe.model.vocab_size:
        raise BadInput(
            f"{teacher}: its vocabulary of {model.config.vocab_size} is not the student's of "
            f"{recipe.model.vocab_size}: its thoughts are of other tokens"
        )
    _require_same_tokens(teacher, stage.tokenizer)
    settled = stage.config
    assert isinstance(settled, DistillConfig), "made of the table [distill]"
    plain = NextTokens(settled, document_mask=True)

    def aim(batch: Batch, settings: StepSettings) -> Distillation:
        return Distillation(plain(batch, settings), model, config)

    digest = checkpoint_sha256(checkpoint_folder(teacher))
    about = {**stage.about, "teacher": str(teacher), "teacher_sha256": digest}
    return replace(stage, aim=aim, about=about, identity=f"{stage.identity}/{digest}")
