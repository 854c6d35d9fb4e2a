"""Schedules by name, and what each of them asks for."""

from __future__ import annotations

from dataclasses import replace

from ziphius.config.errors import BadInput
from ziphius.config.table import nearest
from ziphius.parallel.pipeline.actions import Action, Schedule
from ziphius.parallel.pipeline.dualpipe import dualpipe, dualpipe_v
from ziphius.parallel.pipeline.one_f_one_b import interleaved, one_f_one_b
from ziphius.parallel.pipeline.zero_bubble import zb1p, zb_v

NAMES = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")


def schedule(name: str, ranks: int, micro_batches: int, stages: int | None = None) -> Schedule:
    """Return a schedule of ``NAMES`` for so many ranks and micro-batches a step.

    ``stages``, into which the model is cut, follows from the name, but for ``interleaved``: any
    number of stages a rank from 2, which is the default. Raises BadInput for what cannot work,
    with the reason and the nearest that can.
    """
    if name not in NAMES:
        raise BadInput(f"schedule '{name}': unknown{nearest(name, NAMES)}")
    for what, number in (("ranks", ranks), ("micro-batches", micro_batches)):
        if number < 1:
            raise BadInput(f"schedule {name}: {number} {what}: use 1 or more")
    stages = _stages(name, ranks, stages)
    if name == "dualpipe":
        _even_ranks(ranks)
    if name in ("dualpipe", "dualpipev"):
        _enough_micro_batches(name, ranks, micro_batches)
    match name:
        case "1f1b":
            return one_f_one_b(ranks, micro_batches)
        case "interleaved":
            return interleaved(ranks, micro_batches, stages // ranks)
        case "zb1p":
            return zb1p(ranks, micro_batches)
        case "zbv":
            return zb_v(ranks, micro_batches)
        case "dualpipe":
            return dualpipe(ranks, micro_batches)
        case _:
            return dualpipe_v(ranks, micro_batches)


def fewest(name: str, ranks: int) -> tuple[int, int]:
    """Return how many micro-batches a schedule needs, and of what number a multiple."""
    least = 2 * ranks if name in ("dualpipe", "dualpipev") else 1
    return least, 2 if name == "dualpipe" else 1


def forward_only(schedule: Schedule, micro_batches: int) -> Schedule:
    """Return a table of forwards alone, for stages where another schedule has them.

    A rank's steps ascend by the ranks that a micro-batch has passed, so that nobody waits for what
    comes later.
    """
    table = replace(schedule, name="forward", micro_batches=micro_batches)
    actions = [
        Action("F", stage, micro_batch)
        for micro_batch in range(micro_batches)
        for stage in range(schedule.stages)
    ]
    actions.sort(key=lambda action: (action.stage + action.micro_batch, action))
    steps = tuple(
        tuple(action for action in actions if table.owner(action) == rank)
        for rank in range(schedule.ranks)
    )
    return replace(table, steps=steps)


def _stages(name: str, ranks: int, stages: int | None) -> int:
    """Return into how many stages a schedule cuts the model; refuse another number."""
    most = {"1f1b": 1, "zb1p": 1, "dualpipe": 1, "zbv": 2, "dualpipev": 2}.get(name)
    if most is not None:
        if stages not in (None, most * ranks):
            raise BadInput(
                f"schedule {name}: {stages} stages on {ranks} ranks: it cuts the model into "
                f"{most * ranks}, {most} a rank; use {most * ranks} stages or 'interleaved'"
            )
        return most * ranks
    if stages is None:
        return 2 * ranks
    if stages < 2 * ranks or stages % ranks:
        near = max(2 * ranks, round(stages / ranks) * ranks)
        raise BadInput(
            f"schedule interleaved: {stages} stages on {ranks} ranks: every rank holds the same "
            f"number, 2 or more; use {near}"
        )
    return stages


def _even_ranks(ranks: int) -> None:
    if ranks % 2:
        near = f"{ranks - 1} or {ranks + 1} ranks" if ranks > 1 else "2 ranks"
        raise BadInput(
            f"schedule dualpipe: {ranks} ranks: its two directions meet between two ranks in the "
            f"middle; use {near}, or 'dualpipev', which takes any number"
        )


def _enough_micro_batches(name: str, ranks: int, micro_batches: int) -> None:
    where = f"schedule {name} on {ranks} ranks: {micro_batches} micro-batches"
    if micro_batches < 2 * ranks:
        raise BadInput(
            f"{where}: fewer than two a rank do not fill it; use {2 * ranks}, or '1f1b' or 'zb1p', "
            "which take any number"
        )
    if name == "dualpipe" and micro_batches % 2:
        below, above = micro_batches - 1, micro_batches + 1
        raise BadInput(f"{where}: half of them enters at each end; use {below} or {above}")
