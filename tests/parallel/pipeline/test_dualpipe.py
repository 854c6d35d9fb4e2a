"""DualPipe and DualPipeV do what facts 5.3 and 5.5 say, rank by rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parallel.pipeline.tables import edit, phases, step_counts
from ziphius.parallel.pipeline.actions import Action, Pair
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.simulate import Times, simulate

# Facts 5.3: P = 8, n = 20, by k = min(r, P - 1 - r); facts 5.5: R = 4, n = 10, by r.
WORKED = (
    (6, 1, 3, 3, 3, 1, 3, 1),
    (4, 2, 2, 4, 2, 2, 2, 2),
    (2, 3, 1, 5, 1, 3, 1, 3),
    (0, 4, 0, 6, 0, 4, 0, 4),
)


def facts(k: int, h: int, overlapped: int) -> list[str]:
    """Expand the table of facts 5.3 for one rank, with its notes on steps 4 and 6."""
    line = ["F0"] * (2 * (h - k - 1))
    line += ["F0", "F1"] * (k + 1)
    line += ["I1", "W", "F1"] * (h - k - 1)
    line += ["F0&B1", "F1&B0"] * overlapped
    line += ["B1", "F1&B0"] * (h - k - 1)
    zero_bubble = False
    for iteration in range(k + 1):
        begins = iteration == (k + 1) // 2
        zero_bubble = zero_bubble or (begins and k % 2 == 1)
        line.append("I1" if zero_bubble else "B1")
        zero_bubble = zero_bubble or (begins and k % 2 == 0)
        line.append("I0" if zero_bubble else "B0")
    line += ["W", "I0"] * (h - k - 1)
    line += ["W"] * (k + 1)
    if k == h - 1:  # a middle rank does not overlap the first F0 and B1
        place = line.index("F0&B1")
        line[place : place + 1] = ["F0", "B1"]
    return line


def without_stage_of_w(line: str) -> list[str]:
    return ["W" if name.startswith("W") else name for name in line.split()]


@pytest.mark.parametrize("k", range(4))
def test_counts_of_the_worked_examples(k: int) -> None:
    two_way, v = schedule("dualpipe", 8, 20), schedule("dualpipev", 4, 10)
    assert step_counts(phases(two_way, k)) == WORKED[k]
    assert step_counts(phases(two_way, 7 - k)) == WORKED[k]
    assert step_counts(phases(v, k)) == WORKED[k]


@pytest.mark.parametrize("ranks", range(2, 17, 2))
def test_dualpipe_is_the_table_of_facts_5_3(ranks: int) -> None:
    for micro_batches in (2 * ranks, 2 * ranks + 2, 3 * ranks, 5 * ranks + 4):
        micro_batches += micro_batches % 2
        table = schedule("dualpipe", ranks, micro_batches)
        for rank in range(ranks):
            k = min(rank, ranks - 1 - rank)
            line = facts(k, ranks // 2, micro_batches // 2 - ranks + k + 1)
            assert without_stage_of_w(phases(table, rank)) == line


@pytest.mark.parametrize("ranks", range(1, 17))
def test_dualpipe_v_is_the_table_of_facts_5_5(ranks: int) -> None:
    for micro_batches in (2 * ranks, 2 * ranks + 1, 3 * ranks + 1):
        table = schedule("dualpipev", ranks, micro_batches)
        for rank in range(ranks):
            line = facts(rank, ranks, micro_batches - 2 * ranks + rank + 1)
            assert without_stage_of_w(phases(table, rank)) == line


@given(half=st.integers(1, 6), more=st.integers(0, 9))
def test_dualpipe_v_is_dualpipe_cut_in_half(half: int, more: int) -> None:
    """Either direction, as a rank of DualPipe meets it, is a branch of the V."""
    micro_batches = 2 * half + more
    two_way = schedule("dualpipe", 2 * half, 2 * micro_batches)
    v = schedule("dualpipev", half, micro_batches)
    for rank, steps in enumerate(two_way.steps):
        folded = tuple(
            Pair(*(_fold(action, micro_batches) for action in step.actions))
            if isinstance(step, Pair)
            else _fold(step, micro_batches)
            for step in steps
        )
        assert folded == v.steps[min(rank, 2 * half - 1 - rank)]


def _fold(action: Action, micro_batches: int) -> Action:
    return action._replace(micro_batch=action.micro_batch % micro_batches)


@pytest.mark.parametrize(
    ("times", "gain"), [((1, 2, 1, 3), 0), ((1, 2, 0.8, 2.6), 0.2), ((1, 2, 1, 2.5), -0.5)]
)
def test_what_the_middle_ranks_gain_by_not_overlapping_their_first_pair(
    times: tuple[float, float, float, float], gain: float
) -> None:
    published = overlapped = schedule("dualpipe", 8, 20)
    for rank in (3, 4):
        steps = list(published.steps[rank])
        place = next(i for i, step in enumerate(steps) if step.actions[0].kind == "B")
        forward, backward = steps[place - 1 : place + 1]
        steps[place - 1 : place + 1] = [Pair(*forward.actions, *backward.actions)]
        overlapped = edit(overlapped, rank, steps)
    saved = simulate(overlapped, Times(*times)).total - simulate(published, Times(*times)).total
    assert saved == pytest.approx(gain)


def test_each_direction_enters_at_its_end_and_leaves_at_the_other() -> None:
    table = schedule("dualpipe", 4, 8)
    assert [table.rank_of(0, m) for m in range(8)] == [0] * 4 + [3] * 4
    assert [table.rank_of(3, m) for m in range(8)] == [3] * 4 + [0] * 4
    assert table.chunks(1) == ((0, 1), (1, 2))
    assert table.holders(1) == (1, 2)
    assert table.stages == table.ranks == 4


def test_in_dualpipe_v_the_ends_of_the_model_share_a_rank() -> None:
    table = schedule("dualpipev", 4, 8)
    assert [[chunk.stage for chunk in table.chunks(r)] for r in range(4)] == [
        [0, 7], [1, 6], [2, 5], [3, 4],
    ]  # fmt: skip
    assert table.holders(5) == (2,)
    (turn,) = table.sends(Action("F", 3, 0))
    assert turn.local
