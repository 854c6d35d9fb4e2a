"""Pipelines between real processes, in float64, against one process that runs all micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.parallel.pipeline.tables import ONE_WAY
from tests.parallel.pool import Pool
from tests.support import F64, as_batch, random_model, random_tokens, tiny_config
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.config.pretrain import PretrainConfig
from ziphius.data.rows import Batch
from ziphius.kernels.later import Later
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.transformer import Features, Transformer
from ziphius.model.weights import named_weights
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import Mesh, make_mesh
from ziphius.parallel.passes import Result
from ziphius.parallel.pipeline.actions import Schedule
from ziphius.parallel.pipeline.families import NAMES, schedule
from ziphius.parallel.pipeline.runtime import Pipeline
from ziphius.parallel.pipeline.stage import build_stages
from ziphius.parallel.recompute import apply_recompute
from ziphius.parallel.rows import MicroBatch
from ziphius.parallel.sharding import Buffer, Sharding, axes_of, named_shards
from ziphius.training.balance import ExpertLoads
from ziphius.training.objective import Losses, PreTraining, count_targets, losses

T = 6
SCALE = 4.0
SETTINGS = PretrainConfig(
    steps=1,
    batch_size=1,
    micro_batch_size=1,
    sequence_length=T,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    balance_loss_weight=0.2,
)


class Case(NamedTuple):
    """A pipeline, and the model that runs in it."""

    name: str
    ranks: int
    micro_batches: int
    layers: int = 4
    layout: str | None = None
    stages: int | None = None
    mtp: int = 1
    document_mask: bool = False
    recompute: str = "none"

    @property
    def schedule(self) -> Schedule:
        return schedule(self.name, self.ranks, self.micro_batches, self.stages)


def whole(case: Case) -> Transformer:
    """Return the model, in which one expert has nearly every token and one has none."""
    config = tiny_config(num_hidden_layers=case.layers, num_nextn_predict_layers=case.mtp)
    model = random_model(config, precision=F64)
    with torch.no_grad():
        for _, _, block in model.blocks():
            if isinstance(block.mlp, MixtureOfExperts):
                block.mlp.gate.e_score_correction_bias[0] += 10
                block.mlp.gate.e_score_correction_bias[5] -= 10
    return model


def micro_batches(case: Case) -> list[MicroBatch]:
    """Return micro-batches of two rows with two documents, the last of one, one that counts not."""
    number = case.micro_batches
    tokens_BS = random_tokens(tiny_config(), 2 * number - 1, T + 1)
    batch = as_batch(tokens_BS)
    batch.documents_BS[:, 3:] = 1
    return [MicroBatch(rows, number == 1 or i != 1) for i, rows in enumerate(batch.split(2))]


def counts(case: Case) -> dict[str, Any]:
    batches = [rows for rows, counts in micro_batches(case) if counts]
    return {
        "mtp_loss_weight": 0.7,
        "target_count": sum(count_targets(b, document_mask=case.document_mask) for b in batches),
        "sequence_count": sum(map(len, batches)),
        "document_mask": case.document_mask,
    }


class Expected(NamedTuple):
    sums: list[float]
    loads: dict[int, list[int]]
    gradients: dict[str, Tensor]


@cache
def alone(case: Case) -> Expected:
    """Run all micro-batches in this process."""
    model, loads = whole(case), ExpertLoads(8)
    sums = torch.zeros(4, dtype=torch.float64)
    for batch, counted in micro_batches(case):
        if not counted:
            continue
        parts, routings = losses(model, batch, SETTINGS, **counts(case))
        (parts.total * SCALE).backward()
        loads.add(routings)
        sums += torch.stack((parts.main, parts.mtp, parts.balance, parts.total)).detach()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    by_layer = {layer: counts_E.tolist() for layer, counts_E in loads.counts.items()}
    for counts_E in by_layer.values():
        assert counts_E[0] * 3 == sum(counts_E), "one expert has every token"
        assert counts_E[5] == 0, "and one has none"
    return Expected(sums.tolist(), by_layer, found)


def build(case: Case, mesh: Mesh) -> Pipeline:
    """Build what this rank holds, with the weights of the whole model."""
    table, later, place = case.schedule, Later(), mesh["pp"].place
    weights = dict(named_weights(whole(case)))
    config = tiny_config(num_hidden_layers=case.layers, num_nextn_predict_layers=case.mtp)
    models = build_stages(config, table, place, F64, layout=case.layout, later=later)
    for model in models.values():
        apply_recompute(model, case.recompute)  # type: ignore[arg-type]
        for name, tensor in named_weights(model):
            tensor.copy_(weights[name])
    return Pipeline(table, models, mesh["pp"], later, document_mask=case.document_mask)


def objective(case: Case) -> PreTraining:
    return PreTraining(SETTINGS, **counts(case))


class Watched(NamedTuple):
    """An objective that somebody looks at."""

    look: Callable[[Features, Batch], None]
    plain: PreTraining
    size: int = 4

    def __call__(self, model: Transformer, features: Features, rows: Batch) -> Losses:
        self.look(features, rows)
        return self.plain(model, features, rows)


class Found(NamedTuple):
    """What a rank has: the sums of all, its weights' gradients, and how many it updates."""

    result: Result
    gradients: dict[str, Tensor]
    own: int
    bytes: dict[tuple[str, str], int]


def run(case: Case, ranks: int) -> Found:
    mesh = make_mesh(Layout.fill(ranks, pp=ranks), deadline=20)
    pipeline = build(case, mesh)
    models = sorted(pipeline.models.values(), key=lambda model: model.part.first)
    sharding = Sharding(axes_of(models, mesh, pipeline.schedule), 2**12)
    pipeline.later.add = sharding.add
    result = pipeline.run(micro_batches(case), objective(case), SCALE)
    sent = dict(mesh.traffic.sent)
    sharding.reduce()
    number = sum(piece.weights.numel() for piece in sharding.pieces())
    return Found(result.over(mesh["pp"]), gradients_of(sharding, models), number, sent)


def gradients_of(sharding: Sharding, models: list[Transformer]) -> dict[str, Tensor]:
    """Gather the gradients of this rank's weights."""
    shards: dict[Buffer, Tensor] = {
        buffer: torch.cat(
            [buffer.gradients[slice(*buffer.own(n))] for n in range(buffer.n_buckets)]
        )
        for buffer in sharding.buffers
    }
    named = {_global(model, n): p for model in models for n, p in model.named_parameters()}
    return dict(named_shards(sharding, shards, named.items()))


def _global(model: Transformer, name: str) -> str:
    kind, _, rest = name.partition(".")
    if kind != "layers":
        return name
    index, _, rest = rest.partition(".")
    return f"layers.{int(index) + model.part.first}.{rest}"


def assert_is_alone(case: Case, found: list[Found]) -> None:
    expected = alone(case)
    seen = set()
    for rank, one in enumerate(found):
        torch.testing.assert_close(
            one.result.sums, torch.tensor(expected.sums, dtype=torch.float64), rtol=1e-9, atol=0
        )
        assert {e: n.tolist() for e, n in one.result.counts().items()} == expected.loads
        assert one.result.peak == case.schedule.peak_live(rank)
        for name, gradient in one.gradients.items():
            seen.add(name)
            want = expected.gradients[name]
            error = (gradient - want).norm() / want.norm()
            assert error < 1e-9, (rank, name)
    assert seen == expected.gradients.keys()
    assert sum(one.own for one in found) == sum(g.numel() for g in expected.gradients.values())


CASES = {
    **{f"{name} on 2": Case(name, 2, 5 if name in ONE_WAY else 6) for name in NAMES},
    **{
        f"{name} on 4": Case(name, 4, 9 if name in ONE_WAY else 8, schedule(name, 4, 8).stages)
        for name in NAMES
    },
    "fewer micro-batches than ranks": Case("zb1p", 4, 2),
    "one micro-batch": Case("zbv", 2, 1),
    "odd layers": Case("1f1b", 2, 3, 7, "4|3"),
    "odd layers, three stages a rank": Case("interleaved", 2, 4, 7, "1|2|1|1|1|1", stages=6),
    "an embedding and a head alone": Case("zbv", 2, 3, 3, "0|1|2|0"),
    "both ends of DualPipe alone": Case("dualpipe", 4, 8, 3, "0|1|2|0"),
    "no MTP": Case("dualpipe", 2, 4, 3, "2|1", mtp=0),
    "no MTP, one way": Case("zb1p", 2, 4, 3, "1|2", mtp=0),
    "two MTP depths": Case("1f1b", 3, 4, 3, mtp=2),
    "documents": Case("dualpipev", 2, 4, 4, document_mask=True),
    "selective recomputation": Case("dualpipe", 2, 4, 4, recompute="selective"),
    "full recomputation": Case("zb1p", 2, 4, 4, recompute="full"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_loads_and_gradients_are_those_of_one_process(pool: Pool, case: Case) -> None:
    assert_is_alone(case, pool.run(case.ranks, run, case, case.ranks))


def test_messages_are_sent_in_another_order_than_they_are_needed(pool: Pool) -> None:
    case = Case("zbv", 2, 5)
    needed = [m for step in case.schedule.steps[1] for m in case.schedule.receives(step)]
    channel = case.schedule.channel(0, 1)
    assert [m for m in needed if not m.local] != list(channel)
    assert_is_alone(case, pool.run(2, run, case, 2))


def test_bytes_are_hidden_states_or_their_gradients(pool: Pool) -> None:
    rows, D = 2 * 5 - 1, 24
    for one in pool.run(2, run, Case("1f1b", 2, 5), 2):
        assert one.bytes == {("pp", "send"): rows * T * D * 8}


def test_what_was_sent_is_let_go(pool: Pool) -> None:
    """How many messages are kept does not grow with the micro-batches."""
    few, many = (
        [one.result.peak_sent for one in pool.run(2, run, Case("1f1b", 2, number, 2), 2)]
        for number in (4, 12)
    )
    assert few == many
    assert max(few) <= 3


def storages(case: Case) -> tuple[int, int]:
    """Count at most how many routings' and outputs' memories were alive when a forward ended."""
    mesh = make_mesh(Layout.fill(case.ranks, pp=case.ranks))
    pipeline = build(case, mesh)
    kept: list[StorageWeakRef] = []
    outputs: list[StorageWeakRef] = []
    most = [0, 0]

    def look(features: Features, batch: Batch) -> None:
        routing = features.routings[max(features.routings)]
        kept.append(StorageWeakRef(routing.scores_NE.untyped_storage()))
        outputs.append(StorageWeakRef(features.hidden_BTD.untyped_storage()))
        for number, refs in enumerate((kept, outputs)):
            most[number] = max(most[number], sum(not ref.expired() for ref in refs))

    pipeline.run(micro_batches(case), Watched(look, objective(case)))
    assert all(ref.expired() for ref in kept + outputs)
    return most[0], most[1]


@pytest.mark.parametrize(("name", "ranks"), [("1f1b", 3), ("dualpipe", 2)])
def test_memory_is_that_of_the_table(pool: Pool, name: str, ranks: int) -> None:
    """What backward needs lives as long as the table says, and outputs as long as they travel."""
    case = Case(name, ranks, 10, 2 * ranks)
    for rank, (kept, outputs) in enumerate(pool.run(ranks, storages, case)):
        peak = case.schedule.peak_live(rank)
        # A pass whose weight gradient waits counts in full in the table, and has freed its graph.
        assert kept == peak if name == "1f1b" else kept <= peak
        assert outputs <= ranks + 1


# Failures


def failing(case: Case) -> str:
    """Fail on rank 1 in its third micro-batch; return what this rank says."""
    mesh = make_mesh(Layout.fill(2, pp=2), deadline=20)
    pipeline = build(case, mesh)
    batches = micro_batches(case)

    def fail(features: Features, batch: Batch) -> None:
        if mesh.rank == 1 and batch is batches[2].rows:
            raise RuntimeError("no\nmemory")

    try:
        pipeline.run(batches, Watched(fail, objective(case)))
    except ZiphiusError as error:
        assert not len(pipeline.later)
        return str(error)
    return "nothing failed"


def test_a_failure_names_rank_action_and_micro_batch(pool: Pool) -> None:
    first, second = pool.run(2, failing, Case("zb1p", 2, 4, 2))
    assert second == "rank 1: forward of stage 1 on micro-batch 2 failed: no memory"
    # Its process has left the group, and the other one says for what it waits.
    assert first.startswith(
        "rank 0: receiving input gradient of stage 1 on micro-batch 2 from rank 1 over pp"
    )


def waiting(case: Case) -> str:
    """Let rank 1 do nothing; return what rank 0 says, and after how long."""
    mesh = make_mesh(Layout.fill(2, pp=2), deadline=0.5)
    pipeline = build(case, mesh)
    if mesh.rank == 1:
        time.sleep(2)
        return ""
    began = time.monotonic()
    try:
        pipeline.run(micro_batches(case), objective(case))
    except ZiphiusError as error:
        assert time.monotonic() - began < 1.9
        return str(error)
    return "nothing failed"


def test_a_deadline_names_rank_action_and_micro_batch(pool: Pool) -> None:
    said, _ = pool.run(2, waiting, Case("1f1b", 2, 3, 2))
    assert said.startswith(
        "rank 0: receiving input gradient of stage 1 on micro-batch 0 from rank 1 over pp"
    )


def refused(case: Case) -> list[str]:
    mesh = make_mesh(Layout.fill(2, pp=2))
    pipeline = build(case, mesh)
    found = []
    with pytest.raises(BadInput) as refusal:
        pipeline.run(micro_batches(case)[:-1], objective(case))
    found.append(str(refusal.value))
    with pytest.raises(BadInput) as refusal:
        Pipeline(schedule("1f1b", 3, 3), pipeline.models, mesh["pp"], Later())
    found.append(str(refusal.value))
    return found


def test_what_does_not_fit_is_refused(pool: Pool) -> None:
    for micro, axis in pool.run(2, refused, Case("1f1b", 2, 3, 2)):
        assert micro == "schedule 1f1b is for 3 micro-batches, and there are 2"
        assert "of 3 ranks on a pipeline of 2" in axis
