"""Our tables beside those that torch.distributed.pipelining makes, without a process group.

- 1F1B, interleaved 1F1B, ZB1P (its interleaved zero bubble with one stage a rank) and DualPipeV:
  the same actions in the same order on every rank. (Torch 2.13's table of 1F1B, which its runtime
  does not use, numbers the forwards of the last rank from 1; they are counted from 0 here.)
- ZB-V: the same order of F, I and W, but torch does not take the weight gradients oldest first
  where a queue is emptied, so there the W are equal as a multiset; totals are equal.

Torch's own validation and its lowering to sends and receives, which fails on a deadlock, take ours.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from tests.parallel.pipeline.tables import ONE_WAY, allowed, counts, edit
from ziphius.parallel.pipeline.actions import Action, Pair, Schedule, Step
from ziphius.parallel.pipeline.check import check
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.simulate import Times, simulate

UNIT = Times(1, 2, 1, 3)
THEIRS = {
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zb1p": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}


def theirs(name: str, ranks: int, micro_batches: int, stages: int) -> dict[int, list[Step]] | None:
    """Return torch's table in our terms; None where torch does not take the size."""
    stage = SimpleNamespace(
        num_stages=stages, group_size=ranks, group_rank=0, submod=None, stage_index=0
    )
    local: Any = stage if name == "1f1b" else [stage] * (stages // ranks)
    if name == "1f1b" and micro_batches < ranks:
        return None  # torch's table then has micro-batches that do not exist
    try:
        made = THEIRS[name](local, micro_batches)
    except ValueError:
        return None
    table = {
        rank: [ours(a) for a in order if a is not None and a.is_compute_op]
        for rank, order in made.pipeline_order.items()
    }
    if name == "1f1b":
        table[ranks - 1] = [from_0(action) for action in table[ranks - 1]]
    return table


def from_0(action: Action) -> Action:
    late = action.kind == "F"
    return action._replace(micro_batch=action.micro_batch - late)


def ours(action: torch_schedules._Action) -> Step:
    if action.sub_actions is not None:
        forward, backward = map(ours, action.sub_actions)
        assert isinstance(forward, Action)
        assert isinstance(backward, Action)
        return Pair(forward, backward)
    return Action(action.computation_type.value, action.stage_index, action.microbatch_index)


def to_torch(step: Step) -> torch_schedules._Action:
    if isinstance(step, Pair):
        parts = tuple(map(to_torch, step))
        return torch_schedules._Action(-1, torch_schedules.OVERLAP_F_B, None, parts)
    kind = torch_schedules._ComputationType(step.kind)
    return torch_schedules._Action(step.stage, kind, step.micro_batch)


def tables(name: str) -> list[tuple[Schedule, dict[int, list[Step]]]]:
    found = []
    for ranks in (2, 3, 4, 7, 8, 16):
        for micro_batches in counts(ranks):
            if allowed(name, ranks, micro_batches):
                for stages in (2, 3) if name == "interleaved" else (None,):
                    table = schedule(name, ranks, micro_batches, stages and stages * ranks)
                    other = theirs(name, ranks, micro_batches, table.stages)
                    if other is not None:
                        found.append((table, other))
    return found


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb1p", "dualpipev"])
def test_the_same_actions_in_the_same_order(name: str) -> None:
    pairs = tables(name)
    assert len(pairs) > 15
    for table, other in pairs:
        assert {rank: list(steps) for rank, steps in enumerate(table.steps)} == other


def test_zb_v_is_the_same_but_for_which_weight_gradient_goes_first() -> None:
    pairs = tables("zbv")
    assert len(pairs) > 30
    differ = 0
    for table, other in pairs:
        copy = table
        for rank, steps in enumerate(table.steps):
            assert Counter(steps) == Counter(other[rank])
            if table.micro_batches >= 2 * table.ranks - 1:
                assert [nameless(step) for step in steps] == [nameless(s) for s in other[rank]]
            differ += list(steps) != other[rank]
            copy = edit(copy, rank, other[rank])
        assert simulate(copy, UNIT).total == simulate(table, UNIT).total
        assert [copy.peak_live(r) for r in range(table.ranks)] == [
            table.peak_live(r) for r in range(table.ranks)
        ]
        assert all("has waited longer" in line for line in check(copy))
    assert differ


def nameless(step: Step) -> tuple[Any, ...]:
    return ("W",) if step.actions[0].kind == "W" else tuple(step)


@pytest.mark.parametrize("name", ONE_WAY)
def test_torch_finds_no_fault_in_ours(name: str) -> None:
    for ranks in (2, 3, 4, 8):
        for micro_batches in counts(ranks):
            if not allowed(name, ranks, micro_batches):
                continue
            table = schedule(name, ranks, micro_batches)
            actions = {r: list(map(to_torch, steps)) for r, steps in enumerate(table.steps)}
            places = torch_schedules._validate_schedule(actions, ranks, table.stages, micro_batches)
            assert tuple(places[stage] for stage in range(table.stages)) == table.places[0]
            lowered = torch_schedules._add_send_recv(actions, places.__getitem__, table.stages)
            sent = sum("SEND" in str(a) for row in lowered.values() for a in row)
            remote = [
                m for row in table.steps for step in row for m in table.sends(step) if not m.local
            ]
            assert sent == len(remote)
