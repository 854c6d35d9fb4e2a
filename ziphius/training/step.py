"""One optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ziphius.config.errors import ZiphiusError
from ziphius.config.pretrain import PretrainConfig
from ziphius.model.transformer import Transformer
from ziphius.training.balance import ExpertLoads, update_biases
from ziphius.training.objective import losses
from ziphius.training.optimizer import AdamW


@dataclass(frozen=True)
class StepResult:
    """The losses of one global batch (nats; see ``Losses``) and how the step went."""

    loss: float
    mtp_loss: float
    balance_loss: float
    total_loss: float
    grad_norm: float
    max_violation: float


def train_step(
    model: Transformer,
    optimizer: AdamW,
    tokens_BS: Tensor,
    config: PretrainConfig,
    learning_rate: float,
    bias_speed: float | None = None,
) -> StepResult:
    """Run forward and backward over the micro-batches, then update weights and routing biases.

    ``tokens`` is the global batch, int64 ``[batch_size, T + 1]``. ``bias_speed`` is gamma, by
    default the recipe's. Raises ZiphiusError when the loss
    or the gradients' norm is not finite; the weights are as before the step then.
    """
    sequences, targets = tokens_BS.shape[0], tokens_BS[:, 1:].numel()
    loads = ExpertLoads(model.config.n_routed_experts)
    sums = torch.zeros(4, dtype=torch.float64)
    model.zero_grad()  # a step that failed has left its gradients
    for micro_BS in tokens_BS.split(config.micro_batch_size):
        parts, routings = losses(
            model, micro_BS, config, target_count=targets, sequence_count=sequences
        )
        parts.total.backward()
        loads.add(routings)
        values = torch.stack((parts.main, parts.mtp, parts.balance, parts.total))
        sums += values.detach().double().cpu()
    grad_norm = optimizer.clip()
    if not torch.isfinite(sums).all() or not grad_norm < float("inf"):
        raise ZiphiusError(
            f"step {optimizer.steps + 1}: loss {sums[0]:g}, gradient norm {grad_norm:g}: "
            "not finite; lower pretrain.learning_rate or lengthen pretrain.warmup_steps"
        )
    optimizer.step(learning_rate)
    speed = config.bias_update_speed if bias_speed is None else bias_speed
    update_biases(model, loads, speed)
    main, mtp, balance, total = sums.tolist()
    return StepResult(main, mtp, balance, total, grad_norm, loads.max_violation())
