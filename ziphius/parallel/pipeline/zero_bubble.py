"""ZB1P and ZB-V: the backward is cut in two, and weight gradients fill what was idle.

Both come from "Zero Bubble Pipeline Parallelism" (Qi et al., 2023): its ZB-H1, which the report of
V3 calls ZB1P, and its ZB-V with two stages a rank, which lie along a V.
"""

from __future__ import annotations

from ziphius.parallel.pipeline.actions import Schedule, Step
from ziphius.parallel.pipeline.row import Row, Stage


def zb1p(ranks: int, micro_batches: int) -> Schedule:
    """Return 1F1B in which rank r leaves up to r weight gradients for later.

    Rank r would hold P - r activations in 1F1B. That many and the r that wait are P on every rank,
    no more than on the first rank of 1F1B.
    """
    rows = []
    for rank in range(ranks):
        row, stage = Row(), Stage(rank, range(micro_batches))
        ahead = min(ranks - 1 - rank, micro_batches)
        for _ in range(ahead):
            row.f(stage)
        for turn in range(micro_batches):
            if turn < micro_batches - ahead:
                row.f(stage)
            row.i(stage)
            if row.waiting > rank:
                row.w()
        while row.waiting:
            row.w()
        rows.append(tuple(row.steps))
    return Schedule("zb1p", micro_batches, (tuple(range(ranks)),), tuple(rows))


def zb_v(ranks: int, micro_batches: int) -> Schedule:
    """Return ZB-V: rank r holds the stages r and 2P - 1 - r, and each backward is cut in two.

    Where forward, I and W take equally long no rank is idle between its first and last action. For
    fewer than 2P - 1 micro-batches it is the schedule of 2P - 1 without those that are missing.
    """
    full = max(micro_batches, 2 * ranks - 1)
    rows = []
    for rank in range(ranks):
        steps = _zb_v_steps(rank, ranks, full)
        rows.append(tuple(step for step in steps if step.actions[0].micro_batch < micro_batches))
    return Schedule("zbv", micro_batches, (v_place(ranks),), tuple(rows))


def v_place(ranks: int) -> tuple[int, ...]:
    """Return the ranks of 2P stages along a V: down to the last rank, and back."""
    return (*range(ranks), *reversed(range(ranks)))


def _zb_v_steps(rank: int, ranks: int, micro_batches: int) -> list[Step]:
    row = Row()
    down, up = (Stage(stage, range(micro_batches)) for stage in (rank, 2 * ranks - 1 - rank))
    # Begin: the first micro-batch is on its way down and up again.
    for _ in range(2 * (ranks - rank) - 1):
        row.f(down)
    for _ in range(rank):
        row.f(up)
        row.f(down)
    for _ in range(ranks - rank):
        row.f(up)
        row.i(up)
        row.w()
    # Go on: one forward and one backward of each stage, for the `up` forwards that are left.
    started = 2 * ranks - 1 - rank
    for turn in range(micro_batches - ranks):
        if turn < micro_batches - started:
            row.f(down)
        row.i(down)
        row.w()
        row.f(up)
        row.i(up)
        row.w()
    # End: gradients of the input first, because ranks below wait for them.
    for _ in range(rank):
        row.i(down)
        row.i(up)
    for _ in range(ranks - rank):
        row.i(down)
        row.w()
    while row.waiting:
        row.w()
    return row.steps
