"""A simulated step is as long as its longest chain of actions, and boxes lie where they may."""

from __future__ import annotations

from graphlib import TopologicalSorter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parallel.pipeline.tables import any_schedule, edit, graph
from ziphius.config.errors import BadInput
from ziphius.parallel.pipeline.actions import Action, Pair, Schedule, Step
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.simulate import Times, simulate

UNIT = Times(1, 2, 1, 3)


@st.composite
def any_times(draw: st.DrawFn) -> Times:
    forward, inputs, weight = (draw(st.integers(1, 9)) for _ in range(3))
    backward = inputs + weight
    pair = draw(st.integers(max(forward, backward), forward + backward))
    return Times(forward, backward, weight, pair, draw(st.sampled_from([0, 0, 1, 4])))


def longest_chain(table: Schedule, times: Times) -> int:
    """The same number by dynamic programming over the graph of the tests' own making."""
    edges = graph(table)
    ends: dict[tuple[int, int], float] = {}
    for node in TopologicalSorter(edges).static_order():
        rank, place = node
        step = table.steps[rank][place]
        if isinstance(step, Pair):
            length = times.pair
        else:
            split = {"I": times.backward - times.weight, "W": times.weight}
            length = {"F": times.forward, "B": times.backward, **split}[step.kind]
        begins = [ends[b] + (times.message if b[0] != rank else 0) for b in edges[node]]
        ends[node] = max(begins, default=0) + length
    return max(ends.values())


@given(table=any_schedule(), times=any_times())
def test_total_is_the_longest_chain(table: Schedule, times: Times) -> None:
    assert simulate(table, times).total == longest_chain(table, times)


@given(table=any_schedule(), times=any_times())
def test_a_rank_does_one_thing_at_a_time_and_its_time_adds_up(
    table: Schedule, times: Times
) -> None:
    timeline = simulate(table, times)
    for rank, row in enumerate(timeline.boxes):
        assert [box.step for box in row] == list(table.steps[rank])
        assert {box.rank for box in row} == {rank}
        gaps = [after.start - before.end for before, after in pairwise(row)]
        assert min(gaps) >= 0
        assert timeline.idle(rank) == sum(gaps)
        assert timeline.busy(rank) == sum(times.of(step) for step in table.steps[rank])
        ends = row[0].start + timeline.total - row[-1].end
        assert timeline.bubble(rank) == timeline.idle(rank) + ends
    assert min(row[0].start for row in timeline.boxes) == 0


def test_two_ranks_by_hand() -> None:
    """1F1B of two micro-batches, messages that take half a unit."""
    timeline = simulate(schedule("1f1b", 2, 2), Times(1, 2, 1, 3, message=0.5))
    assert [(str(b.step), b.start, b.end) for b in timeline.boxes[0]] == [
        ("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 5, 7), ("0B1", 8, 10),
    ]  # fmt: skip
    assert [(str(b.step), b.start, b.end) for b in timeline.boxes[1]] == [
        ("1F0", 1.5, 2.5), ("1B0", 2.5, 4.5), ("1F1", 4.5, 5.5), ("1B1", 5.5, 7.5),
    ]  # fmt: skip
    assert timeline.total == 10
    assert (timeline.busy(0), timeline.idle(0), timeline.bubble(0)) == (6, 4, 4)
    assert (timeline.busy(1), timeline.idle(1), timeline.bubble(1)) == (6, 0, 4)


def test_a_pair_needs_both_inputs_and_hands_over_both_results_at_its_end() -> None:
    timeline = simulate(schedule("dualpipe", 2, 4), Times(2, 4, 2, 5))
    row = {str(box.step): box for box in timeline.boxes[0]}
    other = {str(box.step): box for box in timeline.boxes[1]}
    pair = row["1F3&0B0"]
    assert pair.start == max(row["1B2"].end, other["1B0"].end, other["0F3"].end)
    assert pair.end - pair.start == 5


def test_every_stage_may_have_its_own_times() -> None:
    class Uneven:
        message = 0.0

        def of(self, step: Step) -> float:
            return sum(10.0 if a.stage == 1 else 1.0 for a in step.actions)

    timeline = simulate(schedule("1f1b", 2, 3), Uneven())
    assert timeline.busy(0) == 6
    assert timeline.busy(1) == 60
    assert timeline.idle(1) == 0


def test_a_message_inside_a_rank_takes_no_time() -> None:
    """The last rank of a V hands over to itself."""
    timeline = simulate(schedule("zbv", 1, 2), Times(1, 2, 1, 3, message=7))
    assert timeline.total == timeline.busy(0)


def test_a_table_that_stops_is_refused() -> None:
    table = edit(schedule("1f1b", 2, 2), 0, [])
    with pytest.raises(BadInput, match="rank 1 waits for ever for 0F0 before 1F0"):
        simulate(table, UNIT)


def test_boxes_for_the_picture_say_kind_number_and_chunk() -> None:
    boxes = simulate(schedule("dualpipe", 2, 4), UNIT).pictured()
    assert len(boxes) == sum(map(len, schedule("dualpipe", 2, 4).steps))
    assert boxes[0] == (0, 0, 1, (("F", 0, 0),))
    pairs = [parts for _, _, _, parts in boxes if len(parts) == 2]
    # Rank 0 has direction 0's stage 0 as its first chunk and direction 1's stage 1 as its second.
    assert pairs[0] == (("F", 3, 1), ("B", 0, 0))
    v = simulate(schedule("zbv", 2, 3), UNIT).pictured()
    assert {chunk for rank, _, _, parts in v for _, _, chunk in parts} == {0, 1}


def test_results_carry_no_state_between_runs() -> None:
    table = schedule("dualpipe", 4, 8)
    assert simulate(table, UNIT) == simulate(table, UNIT)
    assert Action("B", 0, 0).results == (Action("I", 0, 0), Action("W", 0, 0))
