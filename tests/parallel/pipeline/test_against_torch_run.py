"""Gradients of our runtime beside those of torch.distributed.pipelining's own, on the same stages.

Torch cuts backward in two by itself, sends by itself, and has its own order: nothing is shared but
the modules, the table's placement and the loss.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import pipelining

from tests.parallel.pipeline.test_runtime import Case, build
from tests.parallel.pool import Pool
from tests.support import as_batch, random_tokens, tiny_config
from ziphius.config.pretrain import PretrainConfig
from ziphius.data.rows import row_targets
from ziphius.model.transformer import Transformer
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import Mesh, make_mesh
from ziphius.parallel.rows import MicroBatch
from ziphius.training.objective import PreTraining, count_targets

T, MICRO_BATCHES = 6, 6
THEIRS: dict[str, Any] = {
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zb1p": pipelining.ScheduleInterleavedZeroBubble,
    "zbv": pipelining.ScheduleZBVZeroBubble,
    "dualpipev": pipelining.ScheduleDualPipeV,
}
# Those whose backward passes are cut in two.
CUT = ("zb1p", "zbv", "dualpipev")
SETTINGS = PretrainConfig(
    steps=1, batch_size=1, micro_batch_size=1, sequence_length=T, learning_rate=1e-2,
    final_learning_rate=1e-3, balance_loss_weight=0.0,
)  # fmt: skip


class Stage(nn.Module):
    """A stage as torch takes one: token rows or hidden states in, hidden states out."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if self.model.part.begins:
            return self.model.features(x).hidden_BTD
        tokens_BS = torch.zeros(len(x), T + 1, dtype=torch.int64)  # only their shape is looked at
        return self.model.features(tokens_BS, None, x).hidden_BTD


def batch() -> Any:
    return as_batch(random_tokens(tiny_config(), 2 * MICRO_BATCHES, T + 1))


def by_torch(case: Case, mesh: Mesh) -> tuple[dict[str, Tensor], float]:
    pipeline, rows = build(case, mesh), batch()
    models = sorted(pipeline.models.values(), key=lambda model: model.part.first)
    last = [model for model in models if model.part.ends]
    numbers = {chunk.stage: model for chunk, model in pipeline.models.items()}
    stages = [
        pipelining.PipelineStage(
            Stage(model), stage, case.schedule.stages, torch.device("cpu"), group=mesh["pp"].group
        )
        for stage, model in sorted(numbers.items())
    ]
    targets_BT = row_targets(rows, 0, document_mask=False)
    count = count_targets(rows)

    def loss(hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        return last[0].cross_entropy(hidden_BTD.flatten(0, 1), targets_BT.flatten()) / count

    local: Any = stages[0] if case.name == "1f1b" else stages
    run = THEIRS[case.name](local, MICRO_BATCHES, loss_fn=loss, scale_grads=False)
    losses: list[Tensor] = []
    given = [rows.tokens_BS] if 0 in numbers else []
    wanted = {"target": targets_BT, "losses": losses} if last else {}
    run.step(*given, **wanted)
    return gradients(models), sum(loss.item() for loss in losses)


def by_ours(case: Case, mesh: Mesh) -> tuple[dict[str, Tensor], float]:
    pipeline, rows = build(case, mesh), batch()
    objective = PreTraining(SETTINGS, 0.0, count_targets(rows), len(rows))
    parts = [MicroBatch(part, counts=True) for part in rows.split(2)]
    result = pipeline.run(parts, objective)
    return gradients(list(pipeline.models.values())), result.sums[0].item()


def gradients(models: list[Transformer]) -> dict[str, Tensor]:
    return {
        f"{model.part.first}.{name}": p.grad
        for model in models
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def compared(case: Case) -> tuple[int, float, float, float]:
    """Return how many gradients there are, how far apart they are at most, and both losses."""
    mesh = make_mesh(Layout.fill(2, pp=2))
    theirs, their_loss = by_torch(case, mesh)
    ours, our_loss = by_ours(case, mesh)
    assert ours.keys() == theirs.keys()
    apart = [((ours[n] - g).norm() / g.norm()).item() for n, g in theirs.items() if g.norm() > 0]
    return len(ours), max(apart), our_loss, their_loss


@pytest.mark.parametrize("name", THEIRS)
def test_gradients_are_those_of_torchs_runtime(pool: Pool, name: str) -> None:
    if name in CUT and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11's own runtime fails on functions that have a backward of their own")
    case = Case(name, 2, MICRO_BATCHES, mtp=0)
    found = pool.run(2, compared, case)
    for number, apart, ours, theirs in found:
        assert number > 10
        assert apart < 1e-9
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert math.isfinite(found[0][2])
    assert any(ours > 0 for _, _, ours, _ in found)
