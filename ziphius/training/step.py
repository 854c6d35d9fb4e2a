"""One optimizer step: forward and backward, a judgement, and the update if it may be made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ziphius.config.pretrain import TrainingConfig
from ziphius.data.rows import Batch
from ziphius.model.transformer import Transformer
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.passes import InOne, Passes
from ziphius.training.balance import ExpertLoads, update_biases
from ziphius.training.objective import count_targets
from ziphius.training.optimizer import Optimizer
from ziphius.training.schedule import StepSettings
from ziphius.training.stage import Aim, NextTokens

Judge = Callable[[float, float], str | None]


@dataclass(frozen=True)
class StepResult:
    """The losses of one global batch (nats; see ``Losses``) and how the step went.

    ``loads`` are the tokens of every expert by layer, ``max_violation`` is their summary.
    ``targets`` counts the tokens of the main loss. ``skipped`` is the reason why nothing was
    updated, or ``None``. ``extra`` are the objective's other numbers.
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
    extra: Mapping[str, float] = field(default_factory=dict)


def finite(loss: float, grad_norm: float) -> str | None:
    """Judge a step by the least that it must be."""
    usable = math.isfinite(loss) and math.isfinite(grad_norm)
    return None if usable else f"loss {loss:g}, gradient norm {grad_norm:g}: not finite"


def train_step(
    trained: Transformer | Passes,
    optimizer: Optimizer,
    batch: Batch,
    config: TrainingConfig,
    settings: StepSettings,
    judge: Judge = finite,
    *,
    document_mask: bool = False,
    aim: Aim | None = None,
) -> StepResult:
    """Run forward and backward over the micro-batches, then update weights and routing biases.

    ``batch`` is the global batch, on the model's device; ``aim`` says what is minimised, next
    tokens if nothing else is. ``judge`` gets the total loss (NaN if a
    part of it is not finite) and the norm of the gradients, and says why the update must not be
    made, if so: then weights, moments and biases stay as they were.

    A model that is ``trained`` is whole, in this process alone. Otherwise all ranks get one batch,
    pass their rows of it, and return one result. Raises BadInput for a batch of too few rows.
    """
    passes = alone(trained, config, document_mask) if isinstance(trained, Transformer) else trained
    parts = passes.cut(batch)
    targets = count_targets(batch, document_mask=document_mask)
    scale = _gradient_scale(passes.models[0], targets)

    objective = (aim or NextTokens(config, document_mask))(batch, settings)
    objective.prepare(passes, parts)
    optimizer.begin(passes.backwards(parts))  # a step that failed has left its gradients
    result = passes.run(parts, objective, scale).over(passes.mesh["world"])
    loads = ExpertLoads(result.loads_LE.shape[1], result.counts())
    grad_norm, factor = optimizer.measure(scale)
    main, mtp, balance, total, *others = result.sums.tolist()
    # One part that is not finite may hide in a sum that is.
    judged = total if result.sums.isfinite().all() else math.nan
    skipped = judge(judged, grad_norm)
    if skipped is None:
        optimizer.step(settings.learning_rate, factor)
        for model in passes.models:
            update_biases(model, loads, settings.bias_update_speed)
    for model in passes.models:
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
        extra=dict(zip(objective.extra, others, strict=True)),
    )


def alone(model: Transformer, config: TrainingConfig, document_mask: bool) -> InOne:
    """Return the passes of a model that is whole, in one process."""
    mesh = make_mesh(Layout())
    return InOne(model, mesh, config.micro_batch_size, document_mask=document_mask)


def _gradient_scale(model: Transformer, targets: int) -> float:
    """Return what gradients are multiplied by on their way through FP8: a power of two.

    The loss is a mean over the global batch, so a token's gradients shrink with its size. The
    quantiser takes no group for smaller than 1e-4 (facts 4.2) and rounds what lies far below it to
    nothing; scaled, a token's gradients are what they would be alone. Powers of two are exact.
    """
    return 2.0 ** math.ceil(math.log2(max(1, targets))) if model.precision.fp8 else 1.0
