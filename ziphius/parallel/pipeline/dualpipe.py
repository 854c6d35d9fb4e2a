"""DualPipe and DualPipeV: eight steps in which nearly every forward overlaps with a backward.

In DualPipe (report section 3.2.1) half of the micro-batches enters at the first rank and half at
the last, and rank r holds stage r for the ones and stage P - 1 - r for the others: two copies of
the parameters. So at any moment a rank has a forward of one direction and a backward of the other,
which run together, the communication of each behind the arithmetic of the other.

DualPipeV is one half of that picture: where DualPipe's two middle ranks exchange what they have
made, its last rank hands it to itself, and the 2R stages of R ranks lie along a V. Therefore both
are made by one function, from a rank's two stages: ``near``, which lies nearer to the model's
input, and ``far``.
"""

from __future__ import annotations

from typing import NamedTuple

from ziphius.parallel.pipeline.actions import Schedule
from ziphius.parallel.pipeline.row import Row, Stage
from ziphius.parallel.pipeline.zero_bubble import v_place


class Counts(NamedTuple):
    """How often a rank repeats each of the eight steps."""

    near_forwards: int  # 1: F near
    both_forwards: int  # 2: F near, F far
    first_backwards: int  # 3: I far, W, F far
    overlapped: int  # 4: F near & B far, F far & B near
    last_forwards: int  # 5: B far, F far & B near
    both_backwards: int  # 6: B far, B near; of these backwards the later half only I
    near_backwards: int  # 7: W, I near
    weights: int  # 8: W


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """Return DualPipe, of an even number of ranks, and at least two micro-batches for each."""
    half = micro_batches // 2
    ways = range(half), range(half, micro_batches)
    rows = []
    for rank in range(ranks):
        mirror = ranks - 1 - rank
        # The first half of the ranks is near to the input of direction 0, the second of 1.
        near, far = (0, 1) if rank < mirror else (1, 0)
        stages = Stage(rank, ways[0]), Stage(mirror, ways[1])
        row = eight_steps(stages[near], stages[far], min(rank, mirror), ranks // 2, half)
        rows.append(tuple(row.steps))
    places = tuple(range(ranks)), tuple(reversed(range(ranks)))
    return Schedule("dualpipe", micro_batches, places, tuple(rows))


def dualpipe_v(ranks: int, micro_batches: int) -> Schedule:
    """Return DualPipeV, in which rank r holds the stages r and 2R - 1 - r."""
    rows = []
    for rank in range(ranks):
        near = Stage(rank, range(micro_batches))
        far = Stage(2 * ranks - 1 - rank, range(micro_batches))
        rows.append(tuple(eight_steps(near, far, rank, ranks, micro_batches).steps))
    return Schedule("dualpipev", micro_batches, (v_place(ranks),), tuple(rows))


def step_counts(depth: int, turn: int, micro_batches: int) -> Counts:
    """Count the repetitions of a rank that is ``depth`` ranks from the input.

    Rank ``turn - 1`` is the one where ``near`` and ``far`` are neighbours; each of the two stages
    has ``micro_batches``.
    """
    below = turn - 1 - depth
    return Counts(
        near_forwards=2 * below,
        both_forwards=depth + 1,
        first_backwards=below,
        overlapped=micro_batches - 2 * turn + depth + 1,
        last_forwards=below,
        both_backwards=depth + 1,
        near_backwards=below,
        weights=depth + 1,
    )


def eight_steps(near: Stage, far: Stage, depth: int, turn: int, micro_batches: int) -> Row:
    """Return what a rank does; see ``step_counts`` for the arguments."""
    count = step_counts(depth, turn, micro_batches)
    row = Row()
    for _ in range(count.near_forwards):
        row.f(near)
    for _ in range(count.both_forwards):
        row.f(near)
        row.f(far)
    for _ in range(count.first_backwards):
        row.i(far)
        row.w()
        row.f(far)
    for time in range(count.overlapped):
        if time == 0 and depth == turn - 1:
            # Published so, to make the bubble smaller. Whether it does depends on the times: by
            # simulation at (F, B, W, F&B) = (1, 2, 0.8, 2.6) yes, at (1, 2, 1, 2.5) no.
            row.f(near)
            row.b(far)
        else:
            row.fb(near, far)
        row.fb(far, near)
    for _ in range(count.last_forwards):
        row.b(far)
        row.fb(far, near)
    backwards = 2 * count.both_backwards
    for time in range(backwards):
        stage = near if time % 2 else far
        if time < backwards // 2:
            row.b(stage)
        else:
            row.i(stage)
    for _ in range(count.near_backwards):
        row.w()
        row.i(near)
    for _ in range(count.weights):
        row.w()
    return row
