"""Whether a table can be executed, and makes every gradient once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ziphius.parallel.pipeline.actions import Action, Pair, Schedule, Step
from ziphius.parallel.pipeline.order import Stuck, in_order


def check(schedule: Schedule) -> list[str]:
    """Return what is wrong with a table, a line a problem, or nothing.

    - Every step lies on the rank that holds its stage for its micro-batch.
    - Of every stage and micro-batch F, I and W are made once, be it in B or apart.
    - A rank that runs its list in order, with receives that block and sends that do not, finds all
      that its steps need: no deadlock.
    - A rank's weight gradients that were put off come in the order in which they were.
    """
    places = list(_places(schedule))
    if places:
        return places  # what follows asks for owners of stages, which may not exist
    return [*_counts(schedule), *_deadlock(schedule), *_queues(schedule)]


def _places(schedule: Schedule) -> Iterator[str]:
    """A step's stage and micro-batch exist, and its rank holds the stage."""
    for rank, steps in enumerate(schedule.steps):
        for place, step in enumerate(steps):
            where = f"rank {rank}, step {place} ({step})"
            for action in step.actions:
                if not 0 <= action.stage < schedule.stages:
                    yield f"{where}: there are {schedule.stages} stages"
                elif not 0 <= action.micro_batch < schedule.micro_batches:
                    yield f"{where}: there are {schedule.micro_batches} micro-batches"
                elif schedule.owner(action) != rank:
                    yield f"{where}: rank {schedule.owner(action)} runs {action}"
            if not _is_pair_of_two(step):
                yield f"{where}: a pair is F and B of different micro-batches"


def _is_pair_of_two(step: Step) -> bool:
    if not isinstance(step, Pair):
        return True
    forward, backward = step
    kinds = (forward.kind, backward.kind)
    return kinds == ("F", "B") and forward.micro_batch != backward.micro_batch


def _counts(schedule: Schedule) -> Iterator[str]:
    """Each result is made once."""
    made = Counter(result for steps in schedule.steps for step in steps for result in step.results)
    for stage in range(schedule.stages):
        for micro_batch in range(schedule.micro_batches):
            for kind in ("F", "I", "W"):
                result = Action(kind, stage, micro_batch)
                if made[result] != 1:
                    rank = schedule.owner(result)
                    yield f"rank {rank} makes {result} {made[result]} times, not once"


def _deadlock(schedule: Schedule) -> Iterator[str]:
    """Every list runs to its end."""
    stuck: list[Stuck] = []
    for _ in in_order(schedule, stuck):
        pass
    for turn, missing in stuck:
        needed = ", ".join(f"{need} of rank {schedule.owner(need)}" for need in missing)
        yield f"rank {turn.rank} waits for ever at step {turn.place} ({turn.step}) for {needed}"


def _queues(schedule: Schedule) -> Iterator[str]:
    """Weight gradients leave the queue as they came in."""
    for rank, steps in enumerate(schedule.steps):
        actions = [action for step in steps for action in step.actions]
        came = [action._replace(kind="W") for action in actions if action.kind == "I"]
        left = [action for action in actions if action.kind == "W"]
        for expected, found in zip(came, left, strict=False):
            if expected != found:
                yield f"rank {rank} runs {found} while {expected} has waited longer"
                break
