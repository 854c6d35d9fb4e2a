"""One optimizer step: forward and backward, a judgement, and the update if it may be made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ziphius.config.pretrain import PretrainConfig
from ziphius.data.rows import Batch
from ziphius.model.transformer import Transformer
from ziphius.training.balance import ExpertLoads, update_biases
from ziphius.training.objective import count_targets, losses
from ziphius.training.optimizer import AdamW
from ziphius.training.schedule import StepSettings

Judge = Callable[[float, float], str | None]


@dataclass(frozen=True)
class StepResult:
    """The losses of one global batch (nats; see ``Losses``) and how the step went.

    ``loads`` are the tokens of every expert by layer, ``max_violation`` is their summary.
    ``targets`` counts the tokens of the main loss. ``skipped`` is the reason why nothing was
    updated, or ``None``.
    """

    loss: float
    mtp_loss: float
    balance_loss: float
    total_loss: float
    grad_norm: float
    max_violation: float
    loads: dict[int, list[int]]
    targets: int
    skipped: str | None


def finite(loss: float, grad_norm: float) -> str | None:
    """Judge a step by the least that it must be."""
    usable = math.isfinite(loss) and math.isfinite(grad_norm)
    return None if usable else f"loss {loss:g}, gradient norm {grad_norm:g}: not finite"


def train_step(
    model: Transformer,
    optimizer: AdamW,
    batch: Batch,
    config: PretrainConfig,
    settings: StepSettings,
    judge: Judge = finite,
    *,
    document_mask: bool = False,
) -> StepResult:
    """Run forward and backward over the micro-batches, then update weights and routing biases.

    ``batch`` is the global batch, on the model's device. ``judge`` gets the total loss (NaN if a
    part of it is not finite) and the norm of the gradients, and says why the update must not be
    made, if so: then weights, moments and biases stay as they were.
    """
    sequences, targets = len(batch.tokens_BS), count_targets(batch, document_mask=document_mask)
    loads = ExpertLoads(model.config.n_routed_experts)
    sums = torch.zeros(4, dtype=torch.float64)
    scale = _gradient_scale(model, targets)
    model.zero_grad()  # a step that failed has left its gradients
    for part in batch.split(config.micro_batch_size):
        parts, routings = losses(
            model,
            part,
            config,
            mtp_loss_weight=settings.mtp_loss_weight,
            target_count=max(1, targets),
            sequence_count=sequences,
            document_mask=document_mask,
        )
        parts.total.backward(torch.full_like(parts.total, scale))
        loads.add(routings)
        values = torch.stack((parts.main, parts.mtp, parts.balance, parts.total))
        sums += values.detach().double().cpu()
    grad_norm, factor = optimizer.measure(scale)
    main, mtp, balance, total = sums.tolist()
    # One part that is not finite may hide in a sum that is.
    judged = total if sums.isfinite().all() else math.nan
    skipped = judge(judged, grad_norm)
    if skipped is None:
        optimizer.step(settings.learning_rate, factor)
        update_biases(model, loads, settings.bias_update_speed)
    model.zero_grad()
    return StepResult(
        loss=main,
        mtp_loss=mtp,
        balance_loss=balance,
        total_loss=total,
        grad_norm=grad_norm,
        max_violation=loads.max_violation(),
        loads={layer: counts_E.tolist() for layer, counts_E in loads.counts.items()},
        targets=targets,
        skipped=skipped,
    )


def _gradient_scale(model: Transformer, targets: int) -> float:
    """Return what gradients are multiplied by on their way through FP8: a power of two.

    The loss is a mean over the global batch, so a token's gradients shrink with its size. The
    quantiser takes no group for smaller than 1e-4 (facts 4.2) and rounds what lies far below it to
    nothing; scaled, a token's gradients are what they would be alone. Powers of two are exact.
    """
    return 2.0 ** math.ceil(math.log2(max(1, targets))) if model.precision.fp8 else 1.0
