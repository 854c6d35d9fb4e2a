"""A table that cannot be executed is found, and the line says where."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.parallel.pipeline.tables import ZERO_BUBBLE, actions_of, any_schedule, edit, runs
from ziphius.parallel.pipeline.actions import Action, Pair, Schedule
from ziphius.parallel.pipeline.check import check
from ziphius.parallel.pipeline.families import NAMES, schedule


def problems(table: Schedule) -> str:
    found = check(table)
    assert all("\n" not in line for line in found)
    return "; ".join(found)


@given(table=any_schedule(), data=st.data())
def test_a_dropped_step_is_found(table: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, table.ranks - 1))
    place = data.draw(st.integers(0, len(table.steps[rank]) - 1))
    steps = list(table.steps[rank])
    gone = steps.pop(place)
    found = problems(edit(table, rank, steps))
    for result in gone.results:
        assert f"rank {rank} makes {result} 0 times" in found


@given(table=any_schedule(), data=st.data())
def test_a_doubled_step_is_found(table: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, table.ranks - 1))
    steps = list(table.steps[rank])
    twice = steps[data.draw(st.integers(0, len(steps) - 1))]
    steps.insert(data.draw(st.integers(0, len(steps))), twice)
    found = problems(edit(table, rank, steps))
    for result in twice.results:
        assert f"rank {rank} makes {result} 2 times" in found


@given(table=any_schedule(), data=st.data())
def test_two_swapped_steps_are_found_if_and_only_if_they_do_harm(
    table: Schedule, data: st.DataObject
) -> None:
    """Harm is a cycle in the graph of what waits for what, or a queue out of order."""
    rank = data.draw(st.integers(0, table.ranks - 1))
    steps = list(table.steps[rank])
    one, two = (data.draw(st.integers(0, len(steps) - 1)) for _ in range(2))
    assume(one != two)
    steps[one], steps[two] = steps[two], steps[one]
    swapped = edit(table, rank, steps)
    harm = not runs(swapped) or not in_queue_order(swapped, rank)
    assert bool(problems(swapped)) == harm


def in_queue_order(table: Schedule, rank: int) -> bool:
    alone = [action for step in table.steps[rank] for action in actions_of(step)]
    came = [action[1:] for action in alone if action.kind == "I"]
    return came == [action[1:] for action in alone if action.kind == "W"]


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_before_its_forward_is_a_deadlock(name: str) -> None:
    table = schedule(name, 4, 8)
    for rank in range(4):
        steps = list(table.steps[rank])
        (action, *_) = actions_of(steps[-1])
        (forward,) = [
            place for place, step in enumerate(steps)
            if Action("F", action.stage, action.micro_batch) in step.results
        ]  # fmt: skip
        back = next(
            place for place, step in enumerate(steps)
            if Action("I", action.stage, action.micro_batch) in step.results
        )  # fmt: skip
        steps[forward], steps[back] = steps[back], steps[forward]
        assert f"rank {rank} waits for ever at step {forward} " in problems(
            edit(table, rank, steps)
        )


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    table = schedule("1f1b", 2, 2)
    # Rank 0 wants a gradient before its second forward; rank 1 wants that forward first.
    crossed = edit(table, 0, [Action(k, 0, m) for k, m in (("F", 0), ("B", 0), ("F", 1), ("B", 1))])
    rank_1 = [Action(k, 1, m) for k, m in (("F", 0), ("F", 1), ("B", 0), ("B", 1))]
    assert check(crossed) == []
    assert check(edit(crossed, 1, rank_1)) == [
        "rank 0 waits for ever at step 1 (0B0) for 1I0 of rank 1",
        "rank 1 waits for ever at step 1 (1F1) for 0F1 of rank 0",
    ]


@pytest.mark.parametrize("name", ZERO_BUBBLE)
def test_weight_gradients_out_of_order_are_found(name: str) -> None:
    table = schedule(name, 4, 8)
    rank = 2 if name == "dualpipe" else 3  # its last two steps empty the queue
    steps = list(table.steps[rank])
    steps[-2:] = reversed(steps[-2:])
    assert check(edit(table, rank, steps)) == [
        f"rank {rank} runs {steps[-2]} while {steps[-1]} has waited longer"
    ]


def test_a_weight_gradient_comes_after_its_input_gradient() -> None:
    table = schedule("zb1p", 2, 2)
    steps = [Action(kind, 0, m) for kind, m in (("F", 0), ("F", 1), ("W", 0), ("I", 0))]
    steps += [Action("I", 0, 1), Action("W", 0, 1)]
    assert "rank 0 waits for ever at step 2 (0W0) for 0I0" in problems(edit(table, 0, steps))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Action("F", 1, 0), "rank 1 runs 1F0"),
        (Action("F", 4, 0), "there are 4 stages"),
        (Action("F", -1, 0), "there are 4 stages"),
        (Action("F", 0, 8), "there are 8 micro-batches"),
        (Pair(Action("F", 0, 1), Action("B", 0, 1)), "of different micro-batches"),
        (Pair(Action("F", 0, 1), Action("I", 0, 0)), "a pair is F and B"),
        (Pair(Action("B", 0, 1), Action("F", 0, 0)), "a pair is F and B"),
    ],
)
def test_a_step_that_has_no_place_is_found(step: Action | Pair, words: str) -> None:
    table = schedule("1f1b", 4, 8)
    found = check(edit(table, 0, [*table.steps[0], step]))
    assert len(found) == 1
    assert found[0].startswith(f"rank 0, step 16 ({step}): ")
    assert words in found[0]


def test_a_copy_of_the_other_direction_is_not_taken_for_its_own() -> None:
    """Rank 0 of DualPipe holds stage 0 for the first half of the micro-batches alone."""
    table = schedule("dualpipe", 4, 8)
    steps = list(table.steps[0])
    steps[0] = Action("F", 0, 4)
    assert "rank 3 runs 0F4" in problems(edit(table, 0, steps))


def test_a_rank_without_steps_is_found() -> None:
    table = schedule("1f1b", 3, 2)
    assert "rank 1 makes 1F0 0 times" in problems(edit(table, 1, []))
    assert check(replace(table, micro_batches=3)) != []
