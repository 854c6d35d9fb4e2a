"""1F1B, and its interleaved form: as soon as a rank can go backward, it does so every other time.

A rank that is ``d`` ranks before the end runs ``d`` forwards first, so that it holds at most one
activation a rank, and not one a micro-batch.
"""

from __future__ import annotations

from ziphius.parallel.pipeline.actions import Action, Schedule, Step
from ziphius.parallel.pipeline.row import Row, Stage


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """Return 1F1B of one stage a rank, for any number of micro-batches."""
    rows = []
    for rank in range(ranks):
        row, stage = Row(), Stage(rank, range(micro_batches))
        ahead = min(ranks - 1 - rank, micro_batches)
        for _ in range(ahead):
            row.f(stage)
        for _ in range(micro_batches - ahead):
            row.f(stage)
            row.b(stage)
        for _ in range(ahead):
            row.b(stage)
        rows.append(tuple(row.steps))
    return Schedule("1f1b", micro_batches, (tuple(range(ranks)),), tuple(rows))


def interleaved(ranks: int, micro_batches: int, stages_per_rank: int) -> Schedule:
    """Return 1F1B with ``stages_per_rank`` stages on each rank: stage s lies on rank s mod P.

    Micro-batches go in groups, of P where P divides their number: a rank runs its first stage on a
    group, then its second on the same group. With v stages a rank the stages are v times smaller,
    and with them the bubble; more is sent, and more activations are alive.
    """
    groups = group_sizes(ranks, micro_batches)
    forward, backward = [], []
    first = 0
    for size in groups:
        group = range(first, first + size)
        forward += [(turn, m) for turn in range(stages_per_rank) for m in group]
        backward += [(turn, m) for turn in reversed(range(stages_per_rank)) for m in group]
        first += size
    rows = []
    for rank in range(ranks):
        fs: list[Step] = [Action("F", turn * ranks + rank, m) for turn, m in forward]
        bs: list[Step] = [Action("B", turn * ranks + rank, m) for turn, m in backward]
        # The group has to come to the last stage; from there a gradient takes as many steps back
        # as a hidden state took forth.
        ahead = min((stages_per_rank - 1) * groups[0] + 2 * (ranks - 1 - rank), len(fs))
        alternate = [step for both in zip(fs[ahead:], bs, strict=False) for step in both]
        rows.append((*fs[:ahead], *alternate, *bs[len(fs) - ahead :]))
    place = tuple(stage % ranks for stage in range(ranks * stages_per_rank))
    return Schedule("interleaved", micro_batches, (place,), tuple(rows))


def group_sizes(ranks: int, micro_batches: int) -> list[int]:
    """Cut the micro-batches into groups of at least one a rank, as even as can be, larger first."""
    groups = max(1, micro_batches // ranks)
    size, larger = divmod(micro_batches, groups)
    return [size + 1] * larger + [size] * (groups - larger)
